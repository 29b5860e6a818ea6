"""The features that a TFDS set must have."""

from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from resnet_flax.errors import UserError


def check_features(name: str, features: Any, label: str) -> None:
    """Raises UserError unless every example has an image and one class.

    Args:
      name: of the data set.
      features: of its examples, a `tfds.features.FeaturesDict`.
      label: the name of the feature that is the class.
    """
    lacking = {"image", label} - set(features)
    if lacking:
        raise UserError(
            f"{name} is not for image classification: it lacks {' and '.join(sorted(lacking))} "
            f"(it has {', '.join(features)})"
        )
    if np.dtype(features["image"].np_dtype).kind not in "ui":
        raise UserError(
            f"the images of {name} are floating point, which TFDS stores in the bytes of a PNG; "
            "they must be of 8 or 16 bits per channel"
        )
    found = features[label]
    if isinstance(found, tfds.features.ClassLabel) and found.num_classes:
        return
    if isinstance(found, tfds.features.ClassLabel):
        what = "of an unknown number of classes"
    elif isinstance(found, tfds.features.Text):
        what = "text"
    elif found.shape:
        what = "lists, of several classes or none for an image"
    else:
        what = f"numbers ({np.dtype(found.np_dtype).name}) without classes"
    raise UserError(
        f"the labels of {name} are {what}; give a data set with one class for each image, a "
        "ClassLabel of TFDS, or write its images to DIR/SPLIT/CLASS and give folder:DIR"
    )

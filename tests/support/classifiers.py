"""Tasks for tests of steps."""


def classification(model, augment, normalize, smoothing=0.0):
    """A classification by cross-entropy; see `Classification`."""
    from functools import partial

    from resnet_flax.evaluation.result import Metrics
    from resnet_flax.tasks.classification import Classification
    from resnet_flax.training.losses import cross_entropy

    loss = partial(cross_entropy, smoothing=smoothing)
    return Classification(model, augment, normalize, loss, Metrics(model.num_classes))

"""Reading image files with Pillow.

JPEGs are never decoded at a reduced scale, which gives other pixels than resizing.
"""

import contextlib
import os
import re
import struct
import warnings
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from resnet_flax.data.pixels import NAME, plain
from resnet_flax.errors import UserError, first_line

# Environment variable: images of up to so many pixels are read; Pillow's limit by default.
MAX_PIXELS, USUAL = "RESNET_FLAX_MAX_PIXELS", 178_956_970
# Pillow warns of what is refused here.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def load(file: Any, name: str, channels: int) -> Any:
    """Decodes an image with 8 or 16 bits per channel.

    Args:
      file: to read from, a path or an open file.
      name: for errors.
      channels: 1 for greyscale, 3 for RGB or 4 for RGB and alpha.

    Returns:
      What `pixels.plain` returns: an image with an alpha channel if one of its pixels is
      transparent, for `pixels.Pixels` to decide on.

    Raises:
      UserError: it is damaged, not an image, or of a kind that is not supported.
    """
    limit = _most_pixels()
    Image.MAX_IMAGE_PIXELS = limit  # of the process, as the variable is
    try:
        with Image.open(file) as image:
            if image.width * image.height > limit:
                raise Image.DecompressionBombError(f"{image.width * image.height} pixels")
            image.load()
            image.info[NAME] = name
            return plain(image, channels)
    except UserError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        (pixels, *_) = re.findall(r"\d+", str(error))
        raise UserError(
            f"{name} has {pixels} pixels; more than {limit} are not read, as a small file could "
            "claim all memory, unless you trust your images and set the environment variable "
            f"{MAX_PIXELS} to a number of pixels, such as 1000000000"
        ) from error
    except Exception as error:  # Pillow and its decoders raise errors of all types
        if isinstance(error, OSError) and error.errno:  # of the file system, not of the contents
            raise UserError(f"{name} cannot be read: {error.strerror}") from error
        raise UserError(f"{name} cannot be decoded ({_reason(file, error)}") from error


def _most_pixels() -> int:
    text = os.environ.get(MAX_PIXELS, str(USUAL))
    if not text.isdecimal():
        raise UserError(
            f"{MAX_PIXELS} must be a number of pixels, such as 1000000000, not {text!r}"
        )
    return max(1, int(text))


def _reason(file: Any, error: Exception) -> str:
    """Why an image cannot be decoded, and what can be done."""
    kind, said = _kind(file)
    said = said if isinstance(error, UnidentifiedImageError) and said else first_line(error)
    if kind and "truncated" not in said and "broken" not in said:
        return (
            f"{said}); Pillow does not read this kind of {kind}: convert it to grey, RGB or RGBA "
            "with 8 or 16 bits per channel, or replace it if other programs cannot open it either"
        )
    return f"{said}); it is damaged or not an image: replace or remove it"


def _kind(file: Any) -> tuple[str, str]:
    """The format that a file's first bytes are of, empty if none, and what its reader says."""
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(file.open("rb")) if isinstance(file, Path) else file
        opened.seek(0)
        prefix = opened.read(16)
        for kind, (reader, accept) in list(Image.OPEN.items()):
            try:
                if accept is None or accept(prefix) is not True:
                    continue
            except struct.error:  # of a shorter file
                continue
            try:
                opened.seek(0)
                reader(opened, "")
            except Exception as error:  # of all types
                return kind, first_line(error)
            return kind, ""
    return "", ""

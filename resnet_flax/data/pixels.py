"""From a decoded image to the channels that a network sees: rotation, transparency, 8 bits.

The only place where that is decided: every transform begins with `Pixels`, so training, evaluation,
prediction and images that are kept in memory agree, whatever the source.
"""

import dataclasses
from typing import Any

import numpy as np
from PIL import Image

from resnet_flax.errors import UserError

# Values of `Pixels`, by the name of its field.
CHOICES: dict[str, tuple[Any, ...]] = {
    "exif": ("off", "on"),
    "alpha": ("drop", "white", "error"),
    "channels": (0, 1, 3, 4),
}
# What a preprocessing may ignore, in the order of the counts that `sentences` takes.
IGNORED = ("alpha", "exif")
# In `info` of a Pillow image: its name for errors, which conversions keep.
NAME = "resnet_flax.name"

# By the EXIF orientation.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_GREY = ("1", "L", "LA", "La", "I", "F")
# Tags of TIFF.
_BITS, _PHOTOMETRIC, _SAMPLES, _SAMPLE_FORMAT = 258, 262, 277, 339


@dataclasses.dataclass(frozen=True)
class Pixels:
    """What of an image its pixels are made from.

    Attributes:
      exif: 'on' turns an image upright as its EXIF orientation says; 'off' leaves it as it is
        stored, as torchvision's loader does. (Pillow itself turns TIFFs, in both cases.)
      alpha: of an image with transparent pixels. 'drop' ignores the transparency, as torchvision's
        loader does: what is drawn in the alpha channel alone is then a black area. 'white' shows
        the image on white. 'error' refuses it.
      channels: 1 for grey, 3 for RGB, 4 for RGB and alpha as a fourth number; 0 for those of the
        data. Arrays of 4 channels are RGB and alpha if other channels are wanted.
    """

    exif: str = "off"
    alpha: str = "drop"
    channels: int = 0

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(
                    f"{name} must be one of {', '.join(map(str, choices))}, not "
                    f"{getattr(self, name)!r}"
                )

    def __call__(self, image: Any) -> Any:
        """A Pillow image of mode L or RGB, or an array `[h, w, c]` uint8 of other channels.

        Args:
          image: a Pillow image of any mode, or an array `[h, w, c]` uint8.

        Raises:
          UserError: its pixels cannot be converted, or are transparent where that is an error.
        """
        if not isinstance(image, Image.Image):
            array = to_array(image)
            if self.channels in (0, array.shape[-1]):
                return array
            image = _with_alpha(array)
        elif self.exif == "on":
            image = upright(image)
        image = plain(image, self.channels or channels_of(image))
        return self._without_alpha(image) if _has_alpha(image) else image

    def ignored(self, image: Any) -> np.ndarray:
        """Whether something of an image is ignored, `[2]` bool for `IGNORED`."""
        if not isinstance(image, Image.Image):
            array = to_array(image)
            if array.shape[-1] != 4 or self.channels not in (1, 3):
                return np.zeros(len(IGNORED), bool)
            image = _with_alpha(array)
        dropped = self.alpha == "drop" and self.channels != 4 and image.has_transparency_data
        return np.array(
            [
                dropped and _has_alpha(plain(image, 3)),
                self.exif == "off" and orientation(image) != 1,
            ]
        )

    def _without_alpha(self, image: Image.Image) -> Image.Image:
        if self.alpha == "error":
            raise UserError(
                f"{name_of(image)} has transparent pixels, which alpha=error refuses; "
                "alpha=white shows it on white, alpha=drop ignores the transparency"
            )
        opaque = image.convert(image.mode[:-1])
        if self.alpha == "white":
            canvas = Image.new(opaque.mode, opaque.size, "white")
            canvas.paste(opaque, mask=image.getchannel("A"))
            return canvas
        return opaque


# What torchvision's loader does.
DEFAULT = Pixels()


def sentences(counts: Any, of: str, mend: str) -> list[str]:
    """What to say of images whose transparency or rotation is ignored.

    Args:
      counts: of images, for `IGNORED`.
      of: which images were looked at: 'of the split test'.
      mend: what sets the fields of `Pixels`: '--' or 'data.'.
    """
    said = []
    for count, has, what in (
        (counts[0], "an alpha channel, which is dropped", "alpha=white shows them on white"),
        (counts[1], "an EXIF orientation, which is ignored", "exif=on turns them upright"),
    ):
        if count:
            images = "images have" if count > 1 else "image has"
            said.append(
                f"warning: {count:,} {images} {has} ({of}), as torchvision's loader does; "
                f"{mend}{what}"
            )
    return said


def plain(image: Image.Image, channels: int) -> Any:
    """An image as 8-bit channels, with an alpha channel only where a pixel is transparent.

    Args:
      image: of any mode.
      channels: 1, 3 or 4.

    Returns:
      A Pillow image of mode L or LA for 1, RGB or RGBA for 3; an array `[h, w, 4]` for 4.

    Raises:
      UserError: the range of its pixels is unknown.
    """
    image = eight_bits(image)
    if channels == 4:
        return np.asarray(image.convert("RGBA"))
    if image.has_transparency_data:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        if np.asarray(rgba.getchannel("A")).min() < 255:
            return rgba if channels == 3 else rgba.convert("LA")
        image = rgba
    # By way of RGB, as grey is that of what is seen.
    for mode in ("RGB", "L")[: 1 if channels == 3 else 2]:
        if image.mode not in (mode, "L" if channels == 1 else mode):
            image = image.convert(mode)
    return image


def channels_of(image: Image.Image) -> int:
    """The channels of a Pillow image without its alpha channel: 1 or 3."""
    return 1 if image.mode in _GREY or image.mode.startswith("I;16") else 3


def orientation(image: Image.Image) -> int:
    """What an image's EXIF says of how it is stored: 1 for upright, to 8."""
    try:
        found = image.getexif().get(0x0112)
    except Exception:  # errors of all types, where the EXIF is damaged: then it says nothing
        return 1
    return found if found in _UPRIGHT else 1


def upright(image: Image.Image) -> Image.Image:
    """An image turned as its EXIF says, without its EXIF.

    Pillow's `exif_transpose` writes the EXIF again, and fails where one of its entries is damaged.
    """
    way = _UPRIGHT.get(orientation(image))
    if way is None:
        return image
    found = image.transpose(way)
    found.info = {name: image.info[name] for name in (NAME, "transparency") if name in image.info}
    return found


def eight_bits(image: Image.Image) -> Image.Image:
    """An image of 8 bits per channel, of any mode; 16 and 12 bits are divided, not clipped.

    Raises:
      UserError: its pixels have no known range, or more channels than RGB and alpha.
    """
    tags = getattr(image, "tag_v2", {})
    kind = tags.get(_SAMPLE_FORMAT, (1,))[0]
    if tags.get(_SAMPLES, 1) > 4:
        raise UserError(_not_read(image, f"{tags[_SAMPLES]} channels"))
    wide = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG"))
    if image.mode in ("I", "F") and not wide:
        of = "floating point" if image.mode == "F" else "32 bits, or with a sign,"
        raise UserError(_not_read(image, f"pixels in {of} whose range is unknown"))
    if kind == 2:
        raise UserError(_not_read(image, "pixels with a sign, whose range is unknown"))
    if image.mode == "LAB":
        raise UserError(_not_read(image, "pixels in the color space Lab"))
    if not wide:
        return image
    levels = np.asarray(image) >> (tags.get(_BITS, (16,))[0] - 8)
    if tags.get(_PHOTOMETRIC) == 0:  # white is 0; Pillow inverts it in 8 bits only
        levels = 255 - levels
    found = Image.fromarray(levels.astype(np.uint8))
    found.info = {name: value for name, value in image.info.items() if name != "transparency"}
    if isinstance(image.info.get("transparency"), int):
        opaque = np.asarray(image) != image.info["transparency"]
        found.putalpha(Image.fromarray(np.where(opaque, 255, 0).astype(np.uint8)))
    return found


def name_of(image: Image.Image) -> str:
    """What errors call an image."""
    return str(image.info.get(NAME) or getattr(image, "filename", "") or "an image")


def to_image(image: Any) -> Image.Image:
    """Converts an array `[h, w, c]` uint8 to a Pillow image that can be resized.

    Four channels are resized each by itself: the fourth need not be an alpha channel.

    Raises:
      UserError: it has another number of channels.
    """
    if isinstance(image, Image.Image):
        return image
    height, width, channels = image.shape
    if channels == 4:
        data = np.ascontiguousarray(image)
        return Image.frombuffer("RGBX", (width, height), data, "raw", "RGBX", 0, 1)
    _check_channels(channels, (1, 3))
    return Image.fromarray(image[..., 0] if channels == 1 else image)


def to_array(image: Any) -> np.ndarray:
    """Converts a Pillow image or an array to an array `[h, w, c]` uint8.

    Raises:
      UserError: it has another type, which would be taken for levels from 0 to 255.
    """
    array = np.asarray(image)
    if array.dtype != np.uint8:
        raise UserError(
            f"an image is {array.dtype} {list(array.shape)}; images must be Pillow images of 8 "
            "bits per channel, or arrays [height, width, channels] of uint8, from 0 to 255"
        )
    return array[..., None] if array.ndim == 2 else array


def _with_alpha(array: np.ndarray) -> Image.Image:
    """An array of 1 to 4 channels as L, LA, RGB or RGBA."""
    _check_channels(array.shape[-1], (1, 2, 3, 4))
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def _has_alpha(image: Any) -> bool:
    return isinstance(image, Image.Image) and image.mode in ("LA", "RGBA")


def _check_channels(channels: int, known: tuple[int, ...]) -> None:
    if channels not in known:
        raise UserError(
            f"an image has {channels} channels; only those with 1, 3 or 4 can be resized, or "
            "converted to other channels; give other images, or leave their size and channels"
        )


def _not_read(image: Image.Image, has: str) -> str:
    return (
        f"{name_of(image)} has {has}, which is not supported; convert it to grey, RGB or RGBA "
        "with 8 or 16 bits per channel"
    )

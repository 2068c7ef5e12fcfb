"""One decoder: what it accepts, and that it fails rather than guess."""

import io
import threading
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image, ImageFile

from scalekd.errors import DataError
from scalekd.views import decode_image


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_give_the_pixels(image: Image.Image, kind: str) -> None:
    decoded = decode_image(encode(image, kind), key="a")
    assert decoded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(image))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF"])
def test_lossy_formats_come_close(image: Image.Image, kind: str) -> None:
    decoded = decode_image(encode(image, kind, quality=95), key="a")
    difference = np.abs(np.asarray(decoded).astype(int) - np.asarray(image))
    assert decoded.size == image.size
    assert difference.mean() < 12


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("L", "PNG"),
        ("1", "PNG"),
        ("P", "PNG"),
        ("LA", "PNG"),
        ("RGBA", "PNG"),
        ("CMYK", "JPEG"),
        ("CMYK", "TIFF"),
        ("L", "JPEG"),
        ("RGBA", "WEBP"),
        ("P", "GIF"),
        ("LAB", "TIFF"),
    ],
)
def test_other_modes_are_converted_as_timm_converts_them(
    image: Image.Image, mode: str, kind: str
) -> None:
    if mode == "LAB":
        source = Image.frombytes("LAB", image.size, image.tobytes())
    else:
        source = image.convert(mode)
    if mode.endswith("A"):
        source.putalpha(Image.linear_gradient("L").resize(image.size))
    data = encode(source, kind)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(decode_image(data, key="a")), expected)


@pytest.mark.parametrize("transparency", [b"\x00\x80\xff", 3])
@pytest.mark.parametrize("mode", ["P", "RGB", "L"])
def test_transparency_is_dropped_without_a_warning(
    image: Image.Image, mode: str, transparency: object
) -> None:
    if mode != "P":
        transparency = (1, 2, 3) if mode == "RGB" else 7
    data = encode(image.convert(mode), "PNG", transparency=transparency)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(decode_image(data, key="a")), expected)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_gray_keeps_its_upper_byte(kind: str) -> None:
    values = (np.arange(35, dtype=np.uint16) * 1872).reshape(5, 7)
    decoded = decode_image(encode(Image.fromarray(values), kind), key="a")
    np.testing.assert_array_equal(np.asarray(decoded)[..., 1], values >> 8)


def test_gray_values_without_a_fixed_range_are_refused() -> None:
    for values in (np.full((2, 2), 70_000, np.int32), np.full((2, 2), 0.5, np.float32)):
        with pytest.raises(DataError, match=r"sample cats/1\.tif"):
            decode_image(encode(Image.fromarray(values), "TIFF"), key="cats/1.tif")


def test_exif_rotation_is_not_applied(image: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter
    decoded = decode_image(encode(image, "JPEG", exif=exif.tobytes()), key="a")
    assert decoded.size == image.size


def test_the_first_frame_of_an_animation_is_decoded(image: Image.Image) -> None:
    data = encode(image, "GIF", save_all=True, append_images=[image.rotate(90)])
    first = encode(image, "GIF")
    assert decode_image(data, key="a").tobytes() == decode_image(first, key="a").tobytes()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.6, 0.95])
def test_truncated_bytes_name_the_sample(image: Image.Image, kind: str, share: float) -> None:
    data = encode(image, kind)
    with pytest.raises(DataError, match=r"sample dogs/7: its .* cannot be decoded"):
        decode_image(data[: int(len(data) * share)], key="dogs/7")


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n" + b"x" * 64, b"text" * 99])
def test_bytes_that_are_no_image_name_the_sample(data: bytes) -> None:
    with pytest.raises(DataError, match="sample dogs/7"):
        decode_image(data, key="dogs/7")


def test_damage_in_a_png_is_noticed_by_its_checksums(image: Image.Image) -> None:
    data = bytearray(encode(image, "PNG"))
    data[len(data) // 2] ^= 0x10
    with pytest.raises(DataError, match="sample dogs/7"):
        decode_image(bytes(data), key="dogs/7")


def test_formats_that_run_programs_are_not_opened(image: Image.Image) -> None:
    with pytest.raises(DataError, match="not a JPEG, PNG"):
        decode_image(encode(image, "EPS"), key="a")


def test_huge_images_are_refused_before_their_pixels_take_memory() -> None:
    header = b"P6 30000 30000 255\n"  # 2.7 GB, of which no byte is there
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns first unless another library told it not to
        with pytest.raises(DataError, match="sample bomb"):
            decode_image(header, key="bomb")
    with pytest.raises(DataError, match="65,535 on a side"):
        decode_image(b"P6 70000 1 255\n" + bytes(210_000), key="long")


def test_the_limit_holds_when_another_library_lifts_pillows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(DataError, match="30,000 x 30,000 px"):
        decode_image(b"P6 30000 30000 255\n", key="bomb")


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    yield
    assert ImageFile.LOAD_TRUNCATED_IMAGES, "the switch is another library's; it must come back"


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_truncation_is_an_error_even_where_another_library_allows_it(
    image: Image.Image, kind: str
) -> None:
    data = encode(image, kind)
    with pytest.raises(DataError, match="sample a"):
        decode_image(data[: len(data) // 2], key="a")
    assert decode_image(data, key="a").size == image.size


@pytest.mark.usefixtures("lenient")
def test_truncation_is_an_error_in_every_thread(image: Image.Image) -> None:
    data = encode(image, "JPEG")
    wrong = []

    def work() -> None:
        for i in range(40):
            cut = data[: len(data) // 2] if i % 2 else data
            try:
                decode_image(cut, key="a")
            except DataError:
                wrong.append(cut is data)
            else:
                wrong.append(cut is not data)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 160
    assert not any(wrong)

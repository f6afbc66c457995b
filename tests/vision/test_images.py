"""Images as users have them: read, converted, limited in size, or refused with the row's name."""

from __future__ import annotations

import base64
import io
import re
import struct
import warnings

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, ImageFile
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from gspo_lightning.data import images
from gspo_lightning.data.image_columns import kept_rows, with_images
from gspo_lightning.data.images import FORMATS, load_image
from gspo_lightning.data.rows import RowsTask
from gspo_lightning.data.videos import load_video
from gspo_lightning.data.vision import VisionSettings, encode_conversation
from gspo_lightning.errors import UserError
from gspo_lightning.policy.tiny_vlm import SPECIAL_IDS, build_processor

RED = (255, 0, 0)


@pytest.fixture(scope="module")
def processor(tmp_path_factory, smollm2_dir):
    return build_processor(smollm2_dir, tmp_path_factory.mktemp("processor"))


def as_bytes(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def test_paths_bytes_pil_and_dataset_columns_give_the_same_image(tmp_path):
    image = Image.new("RGB", (5, 3), RED)
    path = tmp_path / "red.png"
    path.write_bytes(as_bytes(image))
    forms = [image, str(path), path, as_bytes(image), {"bytes": as_bytes(image), "path": None}, {"path": str(path)}]
    address = "data:image/png;base64," + base64.b64encode(as_bytes(image)).decode()
    lines = "data:image/png;base64,\n" + base64.encodebytes(as_bytes(Image.effect_noise((9, 9), 80))).decode()
    assert lines.count("\n") > 3
    assert load_image(lines, "row x").tobytes() == load_image(lines.replace("\n", "%0A"), "row x").tobytes()
    forms += [address, {"url": address}, address.replace("/", "%2F").replace("+", "%2B").replace("=", "%3D")]
    assert {load_image(form, "row x").tobytes() for form in forms} == {image.tobytes()}


@pytest.mark.parametrize(
    ("image", "colour"),
    [
        (Image.new("L", (4, 4), 128), (128, 128, 128)),
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), RED),
        (Image.new("RGBA", (4, 4), (255, 0, 0, 255)), RED),
        (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("LA", (4, 4), (0, 0)), (255, 255, 255)),
        (Image.new("1", (4, 4), 1), (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (255, 0, 0, 0)).convert("RGBa"), (255, 255, 255)),
    ],
    ids=["grey", "CMYK", "opaque", "transparent on white", "transparent grey", "black and white", "premultiplied"],
)
def test_other_colour_models_become_rgb(image, colour):
    assert load_image(image, "row x").getpixel((1, 1)) == colour
    assert load_image(image, "row x").mode == "RGB"


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_of_grey_keep_their_range(kind):
    values = np.array([[0, 0x00FF, 0x0100], [0x7FFF, 0x8000, 0xFFFF]], dtype=np.uint16)
    stored = as_bytes(Image.fromarray(values), kind)
    assert Image.open(io.BytesIO(stored)).mode == "I;16"
    assert np.asarray(load_image(stored, "row x"))[..., 1].tolist() == [[0, 0, 1], [127, 128, 255]]
    big_endian = Image.frombytes("I;16B", (3, 2), values.astype(">u2").tobytes())
    assert load_image(big_endian, "row x").tobytes() == load_image(stored, "row x").tobytes()


@pytest.mark.parametrize(
    ("stored", "grey"),
    [
        (b"P5 4 1 65535\n" + bytes([0, 0, 0, 255, 1, 0, 255, 255]), [0, 0, 1, 255]),
        (b"P2 4 1 1023\n0 300 600 1023\n", [0, 75, 150, 255]),  # 1023 is white
    ],
    ids=["P5", "P2"],
)
def test_sixteen_bits_of_a_portable_graymap_keep_their_range(stored, grey):
    assert Image.open(io.BytesIO(stored)).mode == "I"
    assert np.asarray(load_image(stored, "row x")).tolist() == [[[value] * 3 for value in grey]]


def test_the_transparent_value_of_sixteen_bits_is_white():
    values = np.array([[0x0100, 0x0101]], dtype=np.uint16)  # both are 1 in 8 bits
    stored = as_bytes(Image.fromarray(values), transparency=0x0101)
    assert np.asarray(load_image(stored, "row x")).tolist() == [[[1, 1, 1], [255, 255, 255]]]


@pytest.mark.parametrize("address", ["data:image/png;base64,", ""], ids=["address", "bare base64"])
def test_an_image_in_base64_that_cannot_be_read_makes_a_short_line(address):
    with pytest.raises(UserError) as error:
        load_image(address + "A" * 1_000_000, "row x")
    assert re.match(
        r"row x: (cannot read the image from|there is no image) \S{60}\.\.\. \(10000\d\d char", str(error.value)
    )
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("raised", [RuntimeError, NotImplementedError, struct.error, EOFError, IndexError])
@pytest.mark.parametrize("when", ["open", "load"])
def test_whatever_a_decoder_raises_names_the_row(monkeypatch, raised, when):
    def fail(*_, **__):
        raise raised("no such format")

    stored = as_bytes(Image.new("RGB", (4, 4)), "BMP")
    monkeypatch.setattr(*((Image, "open") if when == "open" else (ImageFile.ImageFile, "load")), fail)
    with pytest.raises(UserError, match=r"^row x: .*image.*\(no such format\)"):
        load_image(stored, "row x")


def test_the_formats_that_are_read(monkeypatch):
    """EPS is none of them: reading one starts Ghostscript."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    image = Image.new("RGB", (16, 8), RED)
    for kind in (*FORMATS, "MPO"):  # several JPEG in one file, as phones write them
        stored = as_bytes(image, kind, **({"save_all": True, "append_images": [image]} if kind == "MPO" else {}))
        read, opened = load_image(stored, "row x"), Image.open(io.BytesIO(stored))
        assert opened.format == kind and load_image(opened, "row x").tobytes() == read.tobytes()
        assert read.size == (16, 8) and all(abs(a - b) <= 3 for a, b in zip(read.getpixel((8, 4)), RED, strict=True))
    named = "AVIF, BMP, GIF, JPEG, JPEG2000, PNG, PPM, TIFF, WEBP"
    stored = as_bytes(image, "EPS")
    with pytest.raises(UserError) as error:
        load_image(stored, "row x")
    assert str(error.value) == (
        f"row x: cannot read the image from its bytes (not one of {named}); save it as PNG or JPEG"
    )
    with pytest.raises(UserError) as error:
        load_image(Image.open(io.BytesIO(stored)), "row x")
    assert str(error.value) == f"row x: the image is EPS, not one of {named}; save it as PNG or JPEG"


def test_the_rotation_a_camera_noted_is_applied():
    image = Image.new("RGB", (4, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert load_image(as_bytes(image, "JPEG", exif=exif), "row x").size == (2, 4)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("/no/such.png", "row x: there is no image /no/such.png"),
        (b"not an image", "row x: cannot read the image from its bytes"),
        (" ", "row x: the image is blank text; give a path, or remove the row"),
        (b"", "row x: cannot read the image from its bytes"),
        (as_bytes(Image.effect_noise((64, 64), 80))[:900], "row x: the image is broken"),
        (Image.new("RGB", (0, 4)), "row x: the image is 0 x 4 pixels"),
        ({"bytes": None, "path": None}, "row x: the image is missing"),
        (
            "HTTPS://example.com/a.png",
            "row x: the image is a URL (HTTPS://example.com/a.png), and URLs are not fetched",
        ),
        ("s3://bucket/a.png", "row x: the image is a URL (s3://bucket/a.png)"),
        ({"url": "http://example.com/a.png"}, "row x: the image is a URL (http://example.com/a.png)"),
        (
            "data:image/png,raw",
            "row x: cannot read the image from data:image/png,raw (a data: URL must be in base64)",
        ),
        ("data:image/png;base64,?", "row x: cannot read the image from data:image/png;base64,? ("),
        ("data:image/png;base64,A\n?", "row x: cannot read the image from data:image/png;base64,A ? ("),
        (Image.new("I", (4, 4), 30_000), "row x: the image has 32-bit pixel values (mode I), and which"),
        (Image.new("F", (4, 4), 0.5), "row x: the image has 32-bit pixel values (mode F), and which"),
        (7, "row x: an image is a path, bytes or a PIL image, not int"),
        (Image.new("1", (40_000, 20_000)), "row x: the image is 40000 x 20000 pixels, too large"),
    ],
)
def test_what_is_no_image_is_refused_with_the_row(value, message):
    with pytest.raises(UserError) as error:
        load_image(value, "row x")
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("start", ["file://", "FILE://localhost"])
def test_addresses_of_local_files_are_paths(start, tmp_path):
    """As qwen-vl-utils writes them; what a URL spells by numbers is decoded."""
    (tmp_path / "a b").mkdir()
    Image.new("RGB", (4, 4), RED).save(tmp_path / "a b" / "red.png")
    address = f"{start}{tmp_path}/a%20b/red.png"
    assert load_image(address, "row x").getpixel((1, 1)) == RED
    assert len(load_video({"video": f"{start}{tmp_path}/a%20b"}, "row x").frames) == 1
    with pytest.raises(UserError) as error:
        load_image("file://host/red.png", "row x")
    assert str(error.value) == (
        "row x: the image is on the machine host (file://host/red.png); give a path on this one, as in "
        "file:///folder/name"
    )


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_an_animation_is_its_first_frame_and_says_so_once(kind, monkeypatch):
    monkeypatch.setattr(images, "_warned_of", set())
    frames = [Image.new("RGB", (16, 8), colour) for colour in (RED, (0, 0, 255), (0, 255, 0))]
    stored = as_bytes(frames[0], kind, save_all=True, append_images=frames[1:])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for row in "xy":
            seen = load_image(stored, f"row {row}").getpixel((8, 4))
            assert all(abs(a - b) <= 3 for a, b in zip(seen, RED, strict=True))
    expected = [
        "row x: the image has 3 frames, of which the model sees one; give animations as videos (a list of frames). "
        "This is said once"
    ]
    assert [str(w.message) for w in said] == ([] if kind == "MPO" else expected)


def test_a_relative_path_is_said_as_it_was_looked_for_and_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("RGB", (4, 4), RED).save(tmp_path / "red.png")
    for found in ("~/red.png", "red.png", {"path": "~/red.png"}):
        assert load_image(found, "row x").getpixel((1, 1)) == RED
    relative = "a relative path is within the folder of the command"
    for sought, message in [
        ("img/a.png", f"img/a.png (looked for {tmp_path}/img/a.png; {relative})"),
        ("~/a.png", f"~/a.png (looked for {tmp_path}/a.png; {relative})"),
        ("/no/such.png", "/no/such.png"),
    ]:
        with pytest.raises(UserError) as error:
            load_image(sought, "row x")
        assert str(error.value) == f"row x: there is no image {message}"
    with pytest.raises(UserError) as error:
        load_video({"video": "a.mp4"}, "row x")
    assert str(error.value) == f"row x: there is no video a.mp4 (looked for {tmp_path}/a.mp4; {relative})"
    frames = tmp_path / "frames"
    frames.mkdir()
    Image.new("RGB", (4, 4), RED).save(frames / "0.png")
    assert len(load_video({"video": "~/frames"}, "row x").frames) == 1


def conversation(*parts):
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return [{"role": "user", "content": content}]


def encode(processor, *parts, settings=None):
    return encode_conversation(conversation(*parts), processor, settings or VisionSettings(), {}, "row x")


def test_each_image_gets_its_placeholders_in_order(processor):
    ids, mm = encode(processor, "a", Image.new("RGB", (84, 84)), "b", Image.new("RGB", (300, 100)), "c")
    merged = (mm["image_grid_thw"].prod(dim=1) // 4).tolist()
    image = SPECIAL_IDS["<|image_pad|>"]
    assert (mm["mm_token_type_ids"] == 1).tolist() == (ids == image).tolist()
    runs = "".join("i" if token == image else "-" for token in ids.tolist()).strip("-").split("-")
    assert [len(run) for run in runs if run] == merged
    assert len(mm["pixel_values"]) == 4 * sum(merged)


@pytest.mark.parametrize("most", [10_000, 40_000])
def test_an_image_20000_pixels_wide_is_made_smaller(processor, most):
    _, mm = encode(processor, Image.new("RGB", (20_000, 2_000)), "?", settings=VisionSettings(784, most))
    assert mm["image_grid_thw"].prod().item() * 14 * 14 <= most


@pytest.mark.parametrize(
    ("side", "settings", "expected"),
    [
        (200, VisionSettings(max_pixels=50_176), 192),  # the own least, 65536, would make 256 x 256 of it
        (300, VisionSettings(max_pixels=50_176), 192),
        (200, VisionSettings(max_pixels=70_000), 192),  # the own least, in whole patches, would make 288 x 256 of it
        (100, VisionSettings(max_pixels=262_144), 256),  # far from the limit, the own least holds
        (100, VisionSettings(min_pixels=200_000), 448),
        (900, VisionSettings(min_pixels=200_000), 896),
        (900, VisionSettings(min_pixels=2_000_000), 1440),  # above the own most, 1000000
        (1600, VisionSettings(min_pixels=2_000_000), 1408),
    ],
)
def test_a_limit_holds_against_the_processors_own_other_one(side, settings, expected):
    """In whole patches of 32 x 32 pixels, as of Qwen3-VL."""
    own = Qwen2VLImageProcessorPil(patch_size=16, size={"shortest_edge": 65_536, "longest_edge": 1_000_000})
    grid = own(Image.new("RGB", (side, side)), size=settings.size(own))["image_grid_thw"]
    assert (16 * grid[0]).tolist()[1:] == [expected, expected]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ((0, None), "data.min_pixels=0 must be a whole number above 0, or null"),
        ((None, -5), "data.max_pixels=-5 must be a whole number above 0, or null"),
        ((None, 2.5), "data.max_pixels=2.5 must be a whole number above 0, or null"),
        ((None, "many"), "data.max_pixels='many' must be a whole number above 0, or null"),
        ((50_000, 20_000), "data.min_pixels=50000 is above data.max_pixels=20000; no image size lies between them"),
    ],
)
def test_limits_that_no_image_keeps_are_refused(limits, message):
    with pytest.raises(UserError) as error:
        VisionSettings(*limits)
    assert str(error.value) == message


def test_limits_on_pixels_are_refused_where_the_same_two_words_mean_edges():
    own = Idefics2ImageProcessorPil()
    assert {"shortest_edge": 378, "longest_edge": 980}.items() <= dict(own.size).items()
    with pytest.raises(
        UserError, match=r"max_pixels have no effect: Idefics2ImageProcessorPil .* does not count pixels"
    ):
        VisionSettings(max_pixels=250_000).size(own)


def test_a_shape_no_grid_has_is_refused_with_the_row(processor):
    with pytest.raises(UserError, match="row x: the image processor rejects an image"):
        encode(processor, Image.new("RGB", (20_000, 2)), "?")


def test_a_placeholder_written_in_the_text_is_refused(processor):
    with pytest.raises(UserError, match="row x: 2 image placeholders for 1 image;"):
        encode(processor, Image.new("RGB", (84, 84)), "and <|image_pad|>")


def test_a_placeholder_of_videos_written_in_the_text_is_refused(processor):
    with pytest.raises(UserError) as error:
        encode(processor, Image.new("RGB", (84, 84)), "and <|video_pad|>")
    assert str(error.value) == (
        "row x: 1 video placeholder for 0 videos; give one video for each, and do not write <|video_pad|> in the text"
    )


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"max_pixels": 3136}, "'max_pixels' of a part of type image has no effect; remove it (use data.max_pixels, "),
        ({"min_pixels": 3136}, "'min_pixels' of a part of type image has no effect; remove it (use data.min_pixels, "),
        ({"resized_height": 28}, "'resized_height' of a part of type image has no effect; remove it (use data.max_pix"),
        ({"detail": "low"}, "'detail' of a part of type image has no effect; remove it"),
        ({"text": "lost"}, "'text' of a part of type image has no effect; remove it"),
        ({"path": "b.png"}, "'path' of a part of type image has no effect; remove it (give one of image, path, url a"),
        ({"type": "video", "video": "x", "nframes": 3}, "'nframes' of a part of type video has no effect; remove it ("),
    ],
)
def test_a_key_of_a_part_that_nothing_reads_is_refused(processor, monkeypatch, part, message):
    monkeypatch.setattr(processor, "video_processor", object())
    messages = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (28, 28)), **part}]}]
    if part.get("type") == "video":
        del messages[0]["content"][0]["image"]
    with pytest.raises(UserError) as error:
        encode_conversation(messages, processor, VisionSettings(), {}, "row x")
    assert str(error.value).startswith(f"row x: the key {message}")


def test_keys_of_a_part_without_a_value_or_that_the_template_reads_are_no_mistake(processor, monkeypatch):
    image = Image.new("RGB", (28, 28))
    plain, _ = encode(processor, image, "?")
    keys = {"max_pixels": None, "text": "", "caption": "a cat"}
    content = [{"type": "image", "image": image, **keys}, {"type": "text", "text": "?"}]
    messages = [{"role": "user", "content": content}]
    monkeypatch.setattr(processor, "chat_template", processor.chat_template + "{# p.caption #}")
    ids, _ = encode_conversation(messages, processor, VisionSettings(), {}, "row x")
    assert ids.tolist() == plain.tolist()


def test_what_a_template_stumbles_over_is_one_line(processor, monkeypatch):
    monkeypatch.setattr(processor, "chat_template", "{{ messages[0]['content'] + '?' }}")
    with pytest.raises(UserError, match=r"^row x: the model's chat template rejects the prompt: can only concatenate"):
        encode(processor, Image.new("RGB", (84, 84)))


def test_two_placeholders_and_one_image_are_refused_with_the_row():
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "?"}]}]
    with pytest.raises(UserError, match="row x: 2 image placeholders for 1 image;"):
        with_images(messages, ["a.png"], "row x")


def test_columns_fill_the_image_parts_in_order():
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}, {"type": "image"}]}]
    parts = with_images(messages, ["a.png", ["b.png"]], "row x")[0]["content"]
    assert [part.get("image") for part in parts] == ["a.png", None, "b.png"]


def test_an_image_written_in_a_message_is_not_replaced_by_one_of_a_column():
    messages = [{"role": "user", "content": [{"type": "image", "image": "mine.png"}, {"type": "text", "text": "?"}]}]
    for prompt in (messages, [*messages, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]):
        with pytest.raises(UserError) as error:
            with_images(prompt, ["p0"], "row x")
        assert str(error.value) == (
            "row x: an image part of the prompt already has an image, and so have data.task.image_columns; leave the part at "
            "{'type': 'image'}, or data.task.image_columns empty"
        )
    empty = [{"role": "user", "content": [{"type": "image", "image": None}, {"type": "text", "text": "?"}]}]
    assert with_images(empty, ["p0"], "row x")[0]["content"][0] == {"type": "image", "image": "p0"}


def test_images_of_columns_stand_where_the_text_has_their_sign():
    def task(*prompts):
        rows = [{"prompt": prompt, "images": ["p0", "p1"]} for prompt in prompts]
        return RowsTask(rows, num_validation=0, image_columns=["images"], system_prompt="Be brief.")

    image, text = (lambda name: {"type": "image", "image": name}), (lambda text: {"type": "text", "text": text})
    (_, message) = task("<image>what\n<image>").train_row(0)["prompt"]
    assert message == {"role": "user", "content": [image("p0"), text("what\n"), image("p1")]}
    talk = [
        {"role": "user", "content": "a <image> b"},
        {"role": "assistant", "content": "c"},
        {"role": "tool", "content": "<image>"},
        {"role": "user", "content": "<image>d"},
    ]
    assert task(talk).train_row(0)["prompt"][1:] == [
        {"role": "user", "content": [text("a "), image("p0"), text(" b")]},
        *talk[1:3],
        {"role": "user", "content": [image("p1"), text("d")]},
    ]
    (_, message) = task("what").train_row(0)["prompt"]
    assert message["content"] == [image("p0"), image("p1"), text("what")]
    with pytest.raises(UserError) as error:
        task("<image>what").train_row(0)
    assert str(error.value) == (
        "rows row 0: the text has <image> 1 time for 2 images; write it once for each, or not at all, and the images "
        "come before the text"
    )


def test_equal_questions_about_different_images_are_different_prompts():
    rows = [{"prompt": "what?", "image": as_bytes(Image.new("RGB", (4, 4), (n, 0, 0)))} for n in range(6)]
    task = RowsTask(rows, num_validation=2, image_columns=["image"])
    assert task.num_train_rows == 4
    content = task.train_row(0)["prompt"][0]["content"]
    assert [part["type"] for part in content] == ["image", "text"]


def test_rows_that_do_not_match_are_left_out():
    rows = [{"answer": a} for a in ("1.5", "two", "3", None)]
    assert [row["answer"] for row in kept_rows(rows, {"answer": r"[\d.]+"}, "x")] == ["1.5", "3"]
    with pytest.raises(UserError, match="leaves no row"):
        kept_rows(rows, {"answer": "none"}, "x")


def test_the_language_half_computes_what_smollm2_computes_on_text(smollm2_dir):
    from transformers import AutoModelForCausalLM

    from gspo_lightning.policy.tiny_vlm import build_language_half

    ids = torch.randint(17, 49_000, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)(input_ids=ids).logits
        ours = build_language_half(smollm2_dir)(input_ids=ids).logits
    assert torch.equal(ours, expected)

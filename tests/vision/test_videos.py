"""Videos as users have them, and the way through the models' own video processors where those can run."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from gspo_lightning.data.videos import Video, load_video
from gspo_lightning.data.vision import VisionSettings, _limited, encode_conversation, image_of
from gspo_lightning.errors import UserError
from gspo_lightning.packing import pack
from gspo_lightning.policy.processor import ImageTextProcessor
from gspo_lightning.policy.tiny_vlm import SPECIAL_IDS, build_processor
from gspo_lightning.types import Prompt
from tests.support import has_module, relative_distance
from tests.vision.models import padded_vision_logprobs, vision_policy

TEMPLATE = (
    "{% for m in messages %}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% else %}"
    "<|vision_start|><|{{ p.type }}_pad|><|vision_end|>{% endif %}{% endfor %}{% endfor %}"
)


def frames(count=5, size=(112, 84)):
    return [Image.new("RGB", size, (40 * n, 0, 0)) for n in range(count)]


def test_a_list_and_a_folder_of_frames_are_the_same_video_in_the_order_of_names(tmp_path):
    for number, frame in enumerate(frames()):
        frame.save(tmp_path / f"{number:03}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    given = load_video({"video": frames(), "fps": 4}, "row x, video 0")
    read = load_video({"video": str(tmp_path)}, "row x, video 0")
    assert (given.array() == read.array()).all() and given.array().shape == (5, 84, 112, 3)
    assert [frame.getpixel((0, 0))[0] for frame in read.frames] == [0, 40, 80, 120, 160]
    assert (given.fps, read.fps) == (4.0, 2.0)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({}, "row x: the video is missing"),
        ({"video": []}, "row x: the video has no frame"),
        ({"video": 7}, "row x: a video is a list of frames, a folder or a file, not int"),
        ({"video": "/no/such.mp4"}, "row x: there is no video /no/such.mp4"),
        ({"video": "https://example.com/a.mp4"}, r"row x: the video is a URL \(https://example"),
        ({"video": "S3://bucket/a.mp4"}, r"row x: the video is a URL \(S3://bucket/a.mp4\), and URLs are not fetched"),
        ({"video": [frames()[0], "/no/such.png"]}, "row x, frame 1: there is no image"),
        ({"video": [*frames(2), *frames(1, (9, 9))]}, r"row x: the frames differ in size \(\(9, 9\) and \(112, 84\)\)"),
        ({"video": frames(), "fps": 0.0 - 1}, "row x: fps=-1.0 must be a number above 0"),
        ({"video": frames(), "fps": "fast"}, "row x: fps='fast' must be a number above 0"),
    ],
)
def test_what_is_no_video_is_refused_with_the_row(part, message):
    with pytest.raises(UserError, match=f"^{message}"):
        load_video(part, "row x")


def test_a_file_without_its_library_or_that_is_no_video_is_one_line(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"not a video")
    expected = "row x: cannot read the video" if has_module("av") else "row x: reading a.mp4 needs PyAV.*pip install av"
    with pytest.raises(UserError, match=expected):
        load_video({"video": str(tmp_path / "a.mp4")}, "row x")


@pytest.mark.skipif(not has_module("av"), reason="decoding a file needs PyAV: pip install av")
def test_a_file_is_read_at_the_rate_that_the_row_asks_for(tmp_path):
    import av

    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 16, 8, "bgr0"
        for number in range(30):
            image = Image.new("RGB", (16, 8), (8 * number, 0, 0))
            for packet in stream.encode(av.VideoFrame.from_image(image)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    video = load_video({"video": str(tmp_path / "a.mkv"), "fps": 2}, "row x")
    assert [frame.getpixel((0, 0))[0] for frame in video.frames] == [0, 40, 80, 120, 160, 200]


def test_a_page_shows_the_first_frame_of_a_video():
    shown = frames()
    assert image_of({"type": "video", "video": shown}) is shown[0]
    assert image_of({"type": "image", "image": shown[1]}) is shown[1]
    assert image_of({"type": "video", "video": "a.mp4"}) is None


# ---------------------------------------------------------------- with a video processor
# In the tier with vLLM: its environment has torchvision, which transformers' video processors need.


def build(family, base, video_processor):
    from transformers import Qwen2_5_VLProcessor, Qwen3VLProcessor

    name = {"qwen2_5_vl": Qwen2_5_VLProcessor, "qwen3_vl": Qwen3VLProcessor}[family]
    return name(base.image_processor, base.tokenizer, video_processor, chat_template=TEMPLATE)


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def with_video(request, smollm2_dir, tmp_path_factory):
    """A family, and its real processor for 4-pixel patches."""
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    base = build_processor(smollm2_dir, tmp_path_factory.mktemp("processor"))
    base.image_processor.patch_size = 4
    base.image_processor.size = {"shortest_edge": 64, "longest_edge": 640}
    kind = {"qwen2_5_vl": Qwen2VLVideoProcessor, "qwen3_vl": Qwen3VLVideoProcessor}[request.param]
    limits = {"shortest_edge": 64, "longest_edge": 512 if request.param == "qwen2_5_vl" else 2560}
    return request.param, build(request.param, base, kind(patch_size=4, size=limits))


def encode(processor, *parts, settings=None):
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return encode_conversation(
        [{"role": "user", "content": content}], processor, settings or VisionSettings(), {}, "row x"
    )


@pytest.mark.vllm
def test_a_video_beside_an_image_packs_to_what_the_padded_model_computes(with_video):
    family, processor = with_video
    ids, media = encode(
        processor, "a", {"type": "video", "video": frames(6), "fps": 1.0}, "b", {"type": "image", "image": frames()[2]}
    )
    assert media["video_grid_thw"][0, 0] == 3
    # The model's own placeholder ids are others than the tokenizer's, and its vocabulary is smaller.
    policy = vision_policy(family)
    config, types = policy.base_model.config, media["mm_token_type_ids"]
    assert (types == 2).tolist() == (ids == SPECIAL_IDS["<|video_pad|>"]).tolist()
    ids = torch.where(ids == SPECIAL_IDS["<|vision_start|>"], config.vision_start_token_id, 3 + ids % 80)
    ids = torch.where(types == 1, config.image_token_id, torch.where(types == 2, config.video_token_id, ids))
    double = {k: v.double() if v.is_floating_point() else v for k, v in media.items()}
    prompt = Prompt("x", "", ids, {}, double)
    completions = [torch.tensor([5, 6, 7]), torch.tensor([9, 8])]
    logprobs, _ = policy(pack([(ids, completions)], torch.device("cpu"), [prompt]))
    assert relative_distance(logprobs, padded_vision_logprobs(policy, [(prompt, completions)])) < 1e-6
    other = Prompt("x", "", ids, {}, {**double, "pixel_values_videos": double["pixel_values_videos"].flip(0)})
    changed, _ = policy(pack([(ids, completions)], torch.device("cpu"), [other]))
    assert relative_distance(changed, logprobs) > 1e-4


@pytest.mark.vllm
def test_the_rate_of_the_frames_reaches_the_model(with_video):
    family, processor = with_video
    slow, fast = (encode(processor, {"type": "video", "video": frames(4), "fps": fps}) for fps in (0.5, 2.0))
    if family == "qwen3_vl":  # time stamps in the text: <1.0 seconds> is the middle of frames 0 and 2 s apart
        assert processor.tokenizer.decode(slow[0]).count("<1.0 seconds>") == 1
        assert processor.tokenizer.decode(fast[0]).count("<0.2 seconds>") == 1
    else:
        assert (slow[1]["second_per_grid_ts"].item(), fast[1]["second_per_grid_ts"].item()) == (4.0, 1.0)


class Qwen3Limits:
    """Of a video processor, what limits are made of: those of Qwen3-VL are of a whole video."""

    patch_size, merge_size = 16, 2
    size: ClassVar = {"shortest_edge": 131_072, "longest_edge": 786_432}


@pytest.mark.parametrize(
    ("count", "size", "settings", "expected"),
    [
        (2, (256, 256), VisionSettings(1024, 20_000), (128, 128)),
        (12, (256, 256), VisionSettings(1024, 20_000), (128, 128)),
        (5, (640, 200), VisionSettings(max_pixels=20_000), (224, 64)),
        (2, (64, 64), VisionSettings(max_pixels=20_000), (64, 64)),  # not enlarged to the own least of 65536 a frame
        (2, (64, 64), VisionSettings(max_pixels=262_144), (256, 256)),  # to which it is here
        (8, (640, 640), VisionSettings(min_pixels=1024), (288, 288)),  # an eighth of the own most is 98304
    ],
)
def test_every_frame_is_brought_within_the_limits(count, size, settings, expected):
    video = Video(tuple(frames(count, size)), 2.0)
    limited = _limited(video, Qwen3Limits(), settings)
    assert {frame.size for frame in limited.frames} == {expected}
    assert (len(limited.frames), limited.fps) == (count, 2.0)


@pytest.mark.vllm
def test_limits_on_pixels_hold_for_every_frame_of_every_video(with_video):
    _, processor = with_video
    parts = [{"type": "video", "video": frames(count, (200, 100))} for count in (2, 7)]
    _, media = encode(processor, *parts, settings=VisionSettings(64, 320))
    assert media["video_grid_thw"].tolist() == [[1, 2, 6], [4, 2, 6]]  # 8 x 24 pixels: 16 x 24 would be more than 320
    assert len(media["pixel_values_videos"]) == 5 * 2 * 6


def test_without_a_video_processor_a_video_is_one_line(smollm2_dir, tmp_path):
    processor = build_processor(smollm2_dir, tmp_path)
    assert isinstance(processor, ImageTextProcessor)
    with pytest.raises(UserError, match="row x: the prompt has a video, which needs a video processor"):
        encode(processor, {"type": "video", "video": frames()}, "?")


def test_arrays_in_two_videos_are_refused_in_one_line_as_in_one(smollm2_dir, tmp_path):
    processor = build_processor(smollm2_dir, tmp_path)
    processor.video_processor = object()  # not called
    arrays = [{"type": "video", "video": [np.zeros((8, 8, 3), np.uint8)] * 2} for _ in range(2)]
    line = "^row x, video 0, frame 0: an image is a path, bytes or a PIL image, not ndarray"
    with pytest.raises(UserError, match=line):
        encode(processor, *arrays, "?")

"""Where the mixer looks: offsets compared with the model's layers, and the page of dots."""

import itertools
from functools import partial
from typing import Any

import flax.linen as nn
import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import activemlp_jax as am
from activemlp_jax.data.preprocessing import Preprocessing
from activemlp_jax.inference import offsets as module
from activemlp_jax.inference.offsets import BlockOffsets, inspect_offsets, mean_reach, show_to_model
from activemlp_jax.models.layers import Mlp, depthwise
from activemlp_jax.ops import reference
from activemlp_jax.plots import offsets as pictures
from activemlp_jax.plots.offsets import draw_offsets, draw_reach, draw_reads
from activemlp_jax.plots.pictures import add_axes, make_figure, render
from activemlp_jax.utils.errors import UserError
from activemlp_jax.weights.model_card import ModelCard

MODEL = am.ActiveMLP(**goldens.MICRO)
HEIGHT, WIDTH = 45, 61  # no multiple of any stride
CARD = ModelCard(MODEL, Preprocessing(image_size=40, resize_factor=1.2), ("model",), "model")


@pytest.fixture(scope="module")
def variables() -> dict[str, Any]:
    return goldens.rule_variables(MODEL)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return goldens.normal(0, "offsets", (2, HEIGHT, WIDTH, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def blocks(variables: dict[str, Any], images: np.ndarray) -> list[BlockOffsets]:
    return inspect_offsets(MODEL, variables, images)


def with_constant_offsets(variables: dict[str, Any], w: float, h: float) -> dict[str, Any]:
    """Return variables for which all offsets are `w` along the width and `h` along the height."""

    def change(path: Any, leaf: jax.Array) -> jax.Array:
        *_, layer, part, kind = (key.key for key in path[-3:])
        if (layer, part) != ("offset_layer", "linear"):
            return leaf
        if kind == "kernel":
            return jnp.zeros_like(leaf)
        return jnp.repeat(jnp.array([w, h], leaf.dtype), len(leaf) // 2)

    return jax.tree_util.tree_map_with_path(change, variables)


def linear(x: np.ndarray, weights: dict[str, jax.Array]) -> np.ndarray:
    return x @ np.asarray(weights["kernel"], np.float64) + np.asarray(weights.get("bias", 0.0))


def norm(x: np.ndarray, weights: dict[str, jax.Array]) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5)
    return x * np.asarray(weights["scale"]) + np.asarray(weights["bias"])


def test_offsets_and_weights_of_the_first_block_are_those_computed_by_hand(
    variables: dict[str, Any], images: np.ndarray, blocks: list[BlockOffsets]
):
    stage = variables["params"]["stages_0"]
    block, atm = stage["block_0"], stage["block_0"]["atm"]
    stem = jnp.asarray(MODEL.apply(variables, images, method=lambda model, x: model.stem(x)))
    peg = depthwise(stem.shape[-1], jnp.float32, jnp.float32)
    x = np.asarray(stem + peg.apply({"params": stage["peg"]}, stem), np.float64)
    offset = linear(norm(x, block["offset_layer"]["norm"]), block["offset_layer"]["linear"])
    groups = offset.shape[-1] // 2
    offset_w, offset_h = offset[..., :groups], offset[..., groups:]
    goldens.assert_close(blocks[0].offset_w, offset_w, 1e-5, "offset_w")
    goldens.assert_close(blocks[0].offset_h, offset_h, 1e-5, "offset_h")

    seen = norm(x, block["norm1"])
    total = linear(seen, atm["atm_c"])
    for axis, moved in (("w", offset_w), ("h", offset_h)):
        arrays = (jnp.asarray(array, jnp.float32) for array in (seen, moved))
        total += linear(np.asarray(reference.sample(*arrays, axis)), atm[f"atm_{axis}"])
    summary = jnp.asarray(total.mean((1, 2)), jnp.float32)
    fusion = Mlp(2, 24).apply({"params": atm["fusion"]}, summary)
    weights = nn.softmax(jnp.asarray(fusion).reshape(2, 8, 3))
    goldens.assert_close(blocks[0].weights, np.asarray(weights, np.float64), 1e-5, "weights")


def test_every_block_of_every_stage_is_reported_in_order(blocks: list[BlockOffsets]):
    places = [(stage, block) for stage in range(4) for block in range(MODEL.depths[stage])]
    assert [(block.stage, block.block) for block in blocks] == places
    assert [block.stride for block in blocks] == [4] * 2 + [8] * 3 + [16] * 4 + [32] * 2


def test_maps_of_odd_images_have_the_sizes_of_the_pyramid(
    variables: dict[str, Any], images: np.ndarray, blocks: list[BlockOffsets]
):
    maps = jax.eval_shape(partial(MODEL.apply, method="features"), variables, images)
    for block in blocks:
        batch, height, width, channels = maps[block.stage].shape
        groups = channels // MODEL.share_dims[block.stage]
        assert block.offset_w.shape == block.offset_h.shape == (batch, height, width, groups)
        assert block.weights.shape == (batch, channels, 3)
        assert {array.dtype for array in block[3:]} == {np.dtype(np.float32)}


def test_mixing_weights_are_shares_that_sum_to_one(blocks: list[BlockOffsets]):
    for block in blocks:
        assert (block.weights > 0).all()
        np.testing.assert_allclose(block.weights.sum(-1), 1, rtol=1e-5)


def test_a_block_without_offsets_of_its_own_has_those_of_the_block_before(
    blocks: list[BlockOffsets],
):
    reuse = []
    for before, block in itertools.pairwise(blocks):
        if before.stage == block.stage and np.array_equal(before.offset_w, block.offset_w):
            np.testing.assert_array_equal(before.offset_h, block.offset_h)
            reuse.append((block.stage, block.block))
    # Every second block makes new offsets, except for the last block of a stage.
    assert reuse == [(0, 1), (1, 1), (1, 2), (2, 1), (2, 3), (3, 1)]


@pytest.mark.parametrize(("w", "h"), [(0.0, 0.0), (1.5, -2.0), (-40.0, 0.25)])
def test_where_only_the_bias_is_left_every_offset_is_the_bias(
    variables: dict[str, Any], images: np.ndarray, w: float, h: float
):
    for block in inspect_offsets(MODEL, with_constant_offsets(variables, w, h), images):
        assert (block.offset_w == w).all()
        assert (block.offset_h == h).all()


def test_a_segmentation_model_looks_where_its_backbone_does(
    variables: dict[str, Any], images: np.ndarray, blocks: list[BlockOffsets]
):
    segmentor = am.ActiveSegmentor(**goldens.SEG_MICRO["fpn"])
    rest = goldens.rule_variables(segmentor)
    weights = {**rest, "params": {**rest["params"], "active_mlp": variables["params"]}}
    for ours, expected in zip(inspect_offsets(segmentor, weights, images), blocks, strict=True):
        assert ours[:3] == expected[:3]
        for array, other in zip(ours[3:], expected[3:], strict=True):
            np.testing.assert_allclose(array, other, rtol=1e-4, atol=1e-5)


def test_stages_that_are_computed_again_report_the_same(
    variables: dict[str, Any], images: np.ndarray, blocks: list[BlockOffsets]
):
    again = MODEL.clone(remat_stages=(0, 2))
    for ours, expected in zip(inspect_offsets(again, variables, images), blocks, strict=True):
        np.testing.assert_allclose(ours.offset_h, expected.offset_h, rtol=1e-4, atol=1e-5)


def test_a_model_and_a_shape_are_compiled_once(variables: dict[str, Any], images: np.ndarray):
    inspect_offsets(MODEL, variables, images)
    compiled = module._run._cache_size()
    lists = {k: list(v) if isinstance(v, tuple) else v for k, v in goldens.MICRO.items()}
    inspect_offsets(MODEL, with_constant_offsets(variables, 1, 1), images + 1)
    inspect_offsets(am.ActiveMLP(**lists), variables, images)
    assert module._run._cache_size() == compiled


def test_what_the_mixer_leaves_is_in_no_other_program(
    variables: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    tiny = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)

    def program() -> str:
        # Wrap the model in new functions, because jit would reuse a program of the same function.
        return jax.jit(lambda v, x: MODEL.apply(v, x)).lower(variables, tiny).as_text()

    assert set(jax.eval_shape(MODEL.init, jax.random.key(0), tiny)) == {"params"}
    ours = program()
    monkeypatch.setattr(nn.Module, "sow", lambda *_: False)
    assert program() == ours


def test_photos_and_what_the_model_sees_of_them_are_looked_at_alike(variables: dict[str, Any]):
    photo = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    shown = show_to_model(MODEL, photo, CARD)
    assert shown.shape == (1, 40, 40, 3)
    mean, std = (np.array(getattr(CARD.preprocessing, name)) for name in ("mean", "std"))
    expected = inspect_offsets(MODEL, variables, ((shown / 255 - mean) / std).astype(np.float32))
    for form in (photo, photo[None], [photo], Image.fromarray(photo), [Image.fromarray(photo)]):
        found = inspect_offsets(MODEL, variables, form, CARD)
        np.testing.assert_allclose(found[-1].offset_w, expected[-1].offset_w, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((40, 40, 3), np.float32), r"\(40, 40, 3\), expected \[B, H, W, 3\]"),
        (np.zeros((1, 40, 40, 1), np.float32), r"\(1, 40, 40, 1\), expected \[B, H, W, 3\]"),
        (np.zeros((0, 40, 40, 3), np.float32), r"\(0, 40, 40, 3\), expected \[B, H, W, 3\]"),
        (np.zeros((1, 31, 40, 3), np.float32), "expected sides of at least 32"),
        (np.zeros((40, 40, 4), np.uint8), r"\(40, 40, 4\)"),
        (np.zeros((40, 40, 3), np.int32), "int32"),
        ([], "expected at least one"),
    ],
)
def test_images_of_another_kind_are_refused_in_one_line(
    wrong: Any, message: str, variables: dict[str, Any]
):
    with pytest.raises(ValueError, match=message) as error:
        inspect_offsets(MODEL, variables, wrong, CARD)
    assert "\n" not in str(error.value)


def test_scenes_that_the_model_sees_at_two_sizes_are_refused():
    segmentor = am.ActiveSegmentor(**goldens.SEG_MICRO["fpn"]).clone(num_classes=150)
    scenes = [np.zeros((50, 70, 3), np.uint8), np.zeros((50, 50, 3), np.uint8)]
    with pytest.raises(UserError, match=r"512 x 512, 717 x 512 \(width x height\)"):
        show_to_model(segmentor, scenes)


def test_a_block_prints_as_one_short_line(blocks: list[BlockOffsets]):
    text = repr(blocks[2])
    assert text.startswith("BlockOffsets(stage=1, block=0, stride=8, 2 x 6 x 8 tokens, 4 groups,")
    assert "\n" not in text
    assert len(text) < 180, len(text)


# Tests of the page. Its blocks are made up, for one image of 64 x 64 pixels.


def block_of(
    stage: int = 0, block: int = 0, w: float = 0.0, h: float = 0.0, weights: Any = (0.4, 0.4, 0.2)
) -> BlockOffsets:
    """Make a block of two groups, with the same offsets and weights at all positions."""
    side = 16 >> stage
    maps = (np.full((1, side, side, 2), offset, np.float32) for offset in (w, h))
    mixing = np.tile(np.array(weights, np.float32), (1, 4, 1))
    return BlockOffsets(stage, block, 4 << stage, *maps, mixing)


def stage_blocks(**changes: Any) -> list[BlockOffsets]:
    return [block_of(stage, block, **changes) for stage in range(4) for block in range(2)]


GRAY = Image.new("RGB", (64, 64), "gray")
BAND = pictures.MARGIN  # width of the band around a panel


def panel(draw: Any, *arguments: Any, photo: Image.Image = GRAY) -> Image.Image:
    """Draw a panel of 384 x 384 pixels, with a band around it."""
    figure = make_figure(384 + 2 * BAND, 384 + 2 * BAND)
    draw(add_axes(figure, BAND, BAND, 384, 384), photo, *arguments)
    return render(figure)


def colored(picture: Image.Image) -> dict[str, np.ndarray]:
    """Find the pixels (x, y) with the color of `row`, and those with the color of `column`."""
    red, _, blue = np.moveaxis(np.asarray(picture).astype(int), -1, 0)
    found = {"row": red - blue > 60, "column": blue - red > 60}
    return {name: np.argwhere(mask)[:, ::-1] for name, mask in found.items()}


@pytest.mark.parametrize("size", [(64, 64), (64, 40), (40, 64), (600, 150)])
def test_a_page_is_as_wide_as_promised_and_has_a_row_for_each_stage(size: tuple[int, int]):
    shapes = [[-(-(side // 4) // 2**stage) for side in size[::-1]] for stage in range(4)]
    maps = [np.zeros((1, *shape, 2), np.float32) for shape in shapes]
    weights = np.full((1, 4, 3), 1 / 3, np.float32)
    blocks = [BlockOffsets(s, 0, 4 << s, maps[s], maps[s], weights) for s in range(4)]
    photo = Image.new("RGB", size, "gray")
    pages = [draw_offsets(photo, blocks[:count]) for count in (1, 2, 4)]
    assert {page.width for page in pages} == {pictures.WIDTH}
    row = pages[1].height - pages[0].height
    assert row > 384 * min(1, size[1] / size[0])
    assert pages[2].height == pages[0].height + 3 * row


@pytest.mark.parametrize(
    ("token", "w", "h"),
    [((0.3, 0.4), 2.0, 3.0), ((0.3, 0.4), 0.5, -1.25), ((0.8, 0.9), -7.0, -9.5), ((1, 0), -1, 1)],
)
def test_dots_are_in_the_row_and_the_column_as_far_away_as_the_offsets_say(
    token: tuple[float, float], w: float, h: float
):
    # The token's own share is almost 0, because its mark would cover the dots.
    block = block_of(w=w, h=h, weights=(0.5, 0.5, 1e-6))
    picture = panel(draw_reads, block, [token])
    column, row = (min(int(16 * part), 15) for part in token)
    for name, place in (("row", (column + w, row)), ("column", (column, row + h))):
        expected = BAND + (np.array(place) + 0.5) * 384 / 16
        center = colored(picture)[name].mean(0) + 0.5
        assert np.abs(center - expected).max() < 1, f"{name} at {center}, expected {expected}"


def test_a_bias_moves_the_dots_of_a_model_to_its_place(variables: dict[str, Any]):
    photo = np.full((40, 40, 3), 128, np.uint8)
    places = []
    for w, h in ((1.0, 2.0), (4.0, -3.0)):
        moved = with_constant_offsets(variables, w, h)
        found = inspect_offsets(MODEL, moved, photo, CARD)
        page = draw_offsets(show_to_model(MODEL, photo, CARD)[0], found, [(0.5, 0.5)])
        top = page.height - 4 * (384 + pictures.GAP)
        first = page.crop((pictures.MARGIN, top, pictures.MARGIN + 384, top + 384))
        places.append({name: pixels.mean(0) for name, pixels in colored(first).items()})
    token = 384 / 10
    np.testing.assert_allclose(places[1]["row"] - places[0]["row"], (3 * token, 0), atol=1)
    np.testing.assert_allclose(places[1]["column"] - places[0]["column"], (0, -5 * token), atol=1)


def test_places_outside_the_map_are_rings_around_the_photo():
    picture = panel(draw_reads, block_of(w=50.0, h=-50.0), [(0.5, 0.5)])
    assert colored(picture)["row"][:, 0].min() >= 384 + BAND
    assert colored(picture)["column"][:, 1].max() < BAND
    for name in ("row", "column"):
        x, y = np.round(colored(picture)[name].mean(0)).astype(int)
        assert picture.getpixel((x, y)) == (255, 255, 255), "a ring is white inside"


@pytest.mark.parametrize("sign", [-1, 1])
def test_no_ring_is_cut_off_however_much_it_counts(sign: int):
    for weights in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0)):
        block = block_of(w=50.0 * sign, h=50.0 * sign, weights=weights)
        pixels = np.asarray(panel(draw_reads, block, [(0.5, 0.5)]))
        for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
            assert (edge == 255).all()


@pytest.mark.parametrize("kind", ["row", "column"])
def test_the_legend_has_a_dot_and_a_ring_of_each_color(kind: str):
    header = draw_offsets(GRAY, stage_blocks()).crop((0, 0, pictures.WIDTH, pictures.HEADER))
    places = colored(header)[kind]
    places = places[np.argsort(places[:, 0])]
    marks = np.split(places, np.flatnonzero(np.diff(places[:, 0]) > 30) + 1)
    dot, ring = (tuple(np.round(mark.mean(0)).astype(int)) for mark in marks)
    assert header.getpixel(dot) != (255, 255, 255)
    assert header.getpixel(ring) == (255, 255, 255)


@pytest.mark.parametrize(("axis", "number"), [("h", 1), ("w", 2)])
def test_outside_is_where_the_operator_reads_zero(axis: str, number: int):
    offsets = np.arange(-160, 161, dtype=np.float32) / 16  # one offset per group
    moved = np.broadcast_to(offsets, (1, 5, 7, len(offsets)))
    read = reference.sample(jnp.ones(moved.shape), jnp.asarray(moved), axis)
    np.testing.assert_array_equal(pictures.is_outside(moved, number), np.asarray(read) == 0)


def test_a_dot_is_larger_the_more_its_group_counts():
    areas = []
    for share in (0.1, 0.3, 0.9):
        rest = 1 - share
        block = block_of(w=4.0, h=4.0, weights=(share, rest / 2, rest / 2))
        picture = panel(draw_reads, block, [(0.5, 0.5)], photo=Image.new("RGB", (9, 9), "white"))
        areas.append(len(colored(picture)["row"]))
    assert areas[0] < areas[1] < areas[2]
    assert areas[2] / areas[1] == pytest.approx(3, rel=0.3)


def test_reach_is_in_pixels_of_the_input_and_weighted():
    block = block_of(stage=1, w=2.0, h=-5.0, weights=(0.6, 0.2, 0.2))
    np.testing.assert_allclose(mean_reach(block), 8 * (0.6 * 2 + 0.2 * 5) / 0.8, rtol=1e-6)
    block.offset_w[..., 0] = 0
    np.testing.assert_allclose(mean_reach(block), 8 * (0.6 * 1 + 0.2 * 5) / 0.8, rtol=1e-6)


def test_figures_are_means_over_the_blocks_of_the_stage():
    first = block_of(w=1.0, h=2.0, weights=(0.5, 0.3, 0.2))
    second = block_of(block=1, w=3.0, h=40.0, weights=(0.25, 0.25, 0.5))
    found = pictures.stage_statistics([first, second])
    assert found.reach == pytest.approx(
        (4 * (0.5 * 1 + 0.25 * 3) / 0.75, 4 * (0.3 * 2 + 0.25 * 40) / 0.55), rel=1e-5
    )
    assert found.shares == pytest.approx((0.375, 0.275, 0.35), rel=1e-5)
    # Outside are 1 and 3 of 16 positions in a row, on the right, and 2 and all 16 in a column.
    assert found.outside == pytest.approx((1 / 16 + 3 / 16 + 2 / 16 + 1) / 4)


def test_dots_are_of_the_last_block_that_makes_offsets(monkeypatch: pytest.MonkeyPatch):
    shown = []

    def draw(_axes: Any, _photo: Image.Image, block: BlockOffsets, _tokens: Any) -> None:
        shown.append(block.block)

    monkeypatch.setattr(pictures, "draw_reads", draw)
    draw_offsets(GRAY, [block_of(block=number, h=h) for number, h in enumerate((0, 0, 1, 1))])
    draw_offsets(GRAY, [block_of(block=number) for number in range(3)])
    assert shown == [2, 0]


def test_the_map_goes_from_its_least_to_its_most():
    reach = np.array([[3.0, 4.0], [5.0, 7.0]])
    picture = panel(draw_reach, reach)
    last = BAND + 383
    places = ((BAND, BAND), (last, BAND), (BAND, last), (last, last))
    corners = [sum(picture.getpixel(place)) for place in places]
    assert corners == sorted(corners)
    assert picture == panel(draw_reach, 10 * reach), "it is stretched"
    even = np.asarray(panel(draw_reach, np.full((2, 2), 3.0)))[BAND:-BAND, BAND:-BAND]
    assert (even == even[0, 0]).all()


@pytest.mark.parametrize(
    "token", [(1.2, 0.5), (0.5, -0.1), (float("nan"), 0.5), (0.5,), (0.1, 0.2, 0.3)]
)
def test_a_token_outside_the_picture_is_refused_in_one_line(token: Any):
    with pytest.raises(UserError, match="is not a place in the picture, expected x and y") as error:
        draw_offsets(GRAY, stage_blocks(), [(0.5, 0.5), token])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("image", "blocks", "message"),
    [
        (np.zeros((64, 64, 4), np.uint8), stage_blocks(), r"has shape \(64, 64, 4\), expected"),
        (np.zeros((64, 64, 3)), stage_blocks(), "has dtype float64, expected uint8"),
        (Image.new("RGB", (90, 64)), stage_blocks(), "has 90 x 64 pixels, but stage 0 has 16 x 16"),
        (GRAY, [], "no blocks to draw"),
        (GRAY, stage_blocks(w=float("nan")), "block 0 of stage 0 has offsets that are not finite"),
        (
            GRAY,
            [BlockOffsets(0, 0, 4, *np.zeros((2, 3, 16, 16, 2)), np.ones((3, 4, 3)))],
            "blocks are of 3 images, expected those of one",
        ),
    ],
)
def test_what_no_page_can_be_made_of_is_refused_in_one_line(image: Any, blocks: Any, message: str):
    with pytest.raises(UserError, match=message) as error:
        draw_offsets(image, blocks)
    assert "\n" not in str(error.value)

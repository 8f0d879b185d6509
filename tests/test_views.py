"""Views: the same pixels every time, each operation as NumPy says, and nothing that a text could name is changed."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from conftest import picture, vilt_processor
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dde_cache.errors import InputError
from dde_cache.preprocess import Preprocessor
from dde_cache.views import (
    AS_PROCESSED,
    COLOURS_FREE,
    COLOURS_KEPT,
    RECIPES,
    ViewRecipe,
    group_arrays,
    is_spot_checked,
    parse_recipe,
    pixel_hash,
    recipe_name,
    view_of,
)

KEPT = {operation.name: operation.apply for operation in COLOURS_KEPT}
FREE = {operation.name: operation.apply for operation in COLOURS_FREE}
KEYS = st.text(st.characters(codec="utf-8", exclude_characters="\n"), min_size=1, max_size=20)


def array(image):
    return np.asarray(image)


# Each operation against NumPy.


def moved(pixels, matrix):
    """The nearest source pixel of the middle of each pixel; grey where it lies outside."""
    a, b, c, d, e, f = matrix
    height, width = pixels.shape[:2]
    y, x = np.mgrid[:height, :width] + 0.5
    source_x, source_y = (np.floor(one).astype(int) for one in (a * x + b * y + c, d * x + e * y + f))
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    out = np.full_like(pixels, 128)
    out[inside] = pixels[source_y[inside], source_x[inside]]
    return out


def rotated(pixels, degrees):
    height, width = pixels.shape[:2]
    sin, cos = np.sin(np.radians(degrees)), np.cos(np.radians(degrees))
    middle_x, middle_y = width / 2, height / 2
    # y points down: a picture that is turned against the clock takes its pixels from a point turned with it.
    shift = (middle_x - cos * middle_x + sin * middle_y, middle_y - sin * middle_x - cos * middle_y)
    return moved(pixels, (cos, -sin, shift[0], sin, cos, shift[1]))


def blended(other, pixels, factor):
    return (other + factor * (pixels.astype(float) - other)).clip(0, 255)


def grey(pixels):
    red, green, blue = (pixels[..., channel].astype(np.int64) for channel in range(3))
    return np.repeat((19595 * red + 38470 * green + 7471 * blue + 2**15 >> 16)[..., None], 3, axis=-1)


def smoothed(pixels):
    """Each pixel's mean with its neighbours, itself five times; the rim as it is."""
    out = pixels.astype(float)
    height, width = pixels.shape[:2]
    total = 4 * out[1:-1, 1:-1]
    for down in range(3):
        for right in range(3):
            total = total + pixels[down : height - 2 + down, right : width - 2 + right]
    out[1:-1, 1:-1] = np.floor(total / 13 + 0.5)
    return out


def stretched(pixels):
    """Each channel from its least to its greatest value."""
    low, high = pixels.min((0, 1)).astype(float), pixels.max((0, 1)).astype(float)
    return ((pixels - low) * 255 / (high - low)).clip(0, 255)


def equalized(pixels):
    """Each channel through its cumulative histogram, in steps of (pixels - the last count) / 255."""
    out = np.empty_like(pixels)
    for channel in range(3):
        counts = np.bincount(pixels[..., channel].ravel(), minlength=256)
        step = (counts.sum() - counts[counts > 0][-1]) // 255
        before = np.concatenate([[0], np.cumsum(counts)[:-1]])
        table = (step // 2 + before) // step if step else np.arange(256)
        out[..., channel] = table.clip(0, 255)[pixels[..., channel]]
    return out


ORACLES = {
    "shear x": lambda p, sign: moved(p, (1, sign * 0.09, 0, 0, 1, 0)),
    "shear y": lambda p, sign: moved(p, (1, 0, 0, sign * 0.09, 1, 0)),
    "shift x": lambda p, sign: moved(p, (1, 0, sign * 0.1 * p.shape[1], 0, 1, 0)),
    "shift y": lambda p, sign: moved(p, (1, 0, 0, 0, 1, sign * 0.1 * p.shape[0])),
    "rotate": lambda p, sign: rotated(p, sign * 9),
    "sharpness": lambda p, sign: blended(smoothed(p), p, 1 + sign * 0.27),
    "saturation": lambda p, sign: blended(grey(p), p, 1 + sign * 0.27),
    "contrast": lambda p, sign: blended(np.floor(grey(p)[..., 0].mean() + 0.5), p, 1 + sign * 0.27),
    "brightness": lambda p, sign: blended(0, p, 1 + sign * 0.27),
    "autocontrast": lambda p, sign: stretched(p),
    "equalize": lambda p, sign: equalized(p),
    "solarize": lambda p, sign: np.where(p < 179, p, 255 - p),
    "posterize": lambda p, sign: p & 0b11111110,
}
DOWN_ONLY = ("saturation", "contrast", "brightness")


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("size", [(40, 40), (48, 36), (60, 13)])
def test_an_operation_does_what_numpy_says(name, size, sign):
    # Neither black nor white, so that there is contrast to gain.
    image = Image.fromarray((30 + array(picture(*size, seed=3)) * 0.7).astype(np.uint8))
    expected = ORACLES[name](array(image), sign)
    found = array(FREE[name](image, sign)).astype(float)
    # Pillow cuts fractions off.
    assert np.abs(found - expected).max() <= 1
    assert (found != array(image)).any()
    if name in KEPT:
        down = -1 if name in DOWN_ONLY else sign
        np.testing.assert_array_equal(array(KEPT[name](image, sign)), array(FREE[name](image, down)))


def test_every_operation_has_an_oracle():
    assert [operation.name for operation in COLOURS_FREE] == list(ORACLES)
    assert set(KEPT) < set(ORACLES)


def bicubic(pixels, box):
    """Resize a box to the whole picture by cubic convolution (a = -0.5), in floats."""
    left, top, right, bottom = box
    for axis, (start, stop) in ((1, (left, right)), (0, (top, bottom))):
        size = pixels.shape[axis]
        centre = start + (np.arange(size) + 0.5) * (stop - start) / size
        distance = np.abs(np.arange(size) + 0.5 - centre[:, None])
        near, far = 1.5 * distance**3 - 2.5 * distance**2 + 1, -0.5 * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        weights = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
        weights /= weights.sum(1, keepdims=True)
        pixels = np.moveaxis(np.tensordot(weights, pixels.astype(float), (1, axis)), 0, axis).clip(0, 255).round()
    return pixels


@pytest.mark.parametrize("key", ["a", "b", "c"])
def test_a_crop_is_a_part_of_the_picture_brought_to_its_size(key):
    image = picture(48, 24, seed=1)
    found = array(RECIPES["crop"](image, key, 0)).astype(float)
    draws = [
        int.from_bytes(hashlib.sha256(f"{RECIPES['crop']}\n{key}\n0\n0\n{number}".encode()).digest()[:8], "big") / 2**64
        for number in range(3)
    ]
    side = (0.5 + 0.5 * draws[0]) ** 0.5
    width, height = round(side * 48), round(side * 24)
    left, top = int(draws[1] * (48 - width + 1)), int(draws[2] * (24 - height + 1))
    assert np.abs(found - bicubic(array(image), (left, top, left + width, top + height))).max() <= 1


def test_a_flip_mirrors_half_of_the_views():
    image = picture(24, 12)
    flipped = 0
    for view in range(200):
        found = array(RECIPES["flip"](image, "key", view))
        mirrored = (found == array(image)[:, ::-1]).all()
        assert mirrored or (found == array(image)).all()
        flipped += mirrored
    assert 80 < flipped < 120


# What a recipe is.


@given(key=KEYS, view=st.integers(0, 2**16 - 1), slot=st.integers(0, 1), name=st.sampled_from(list(RECIPES)[1:]))
def test_a_view_is_drawn_again_and_has_the_size_of_its_picture(key, view, slot, name):
    image = picture(36, 24)
    before = array(image).copy()
    one, two = (parse_recipe(text)(image, key, view, slot) for text in (name, recipe_name(RECIPES[name])))
    assert one.size == image.size
    np.testing.assert_array_equal(array(one), array(two))
    np.testing.assert_array_equal(array(image), before)


DRAW = """
import hashlib, sys
import numpy as np
from PIL import Image
from dde_cache.views import RECIPES
pixels = np.random.default_rng([7, 36, 24]).integers(0, 256, (24, 36, 3), dtype=np.uint8)
np.random.seed(5)
for name, recipe in RECIPES.items():
    if recipe is not None:
        views = [recipe(Image.fromarray(pixels), key, view, slot)
                 for key in ("a", "ü/b") for view in range(8) for slot in range(2)]
        print(name, hashlib.sha256(b"".join(view.tobytes() for view in views)).hexdigest())
"""


def test_another_process_draws_the_same_views():
    printed = subprocess.run([sys.executable, "-c", DRAW], capture_output=True, text=True, check=True).stdout
    lines = dict(line.rsplit(" ", 1) for line in printed.splitlines())
    image = picture(36, 24, seed=7)
    for name, recipe in list(RECIPES.items())[1:]:
        views = [recipe(image, key, view, slot) for key in ("a", "ü/b") for view in range(8) for slot in range(2)]
        assert lines[name] == hashlib.sha256(b"".join(view.tobytes() for view in views)).hexdigest()
        assert len({view.tobytes() for view in views}) > (2 if name == "flip" else 16) - 1


@pytest.mark.parametrize("name", ["randaugment-2-9", "randaugment-2-9-published", "crop"])
def test_keys_views_and_slots_differ(name):
    image = picture(36, 36)
    views = {
        array(RECIPES[name](image, *place)).tobytes() for place in (("a", 0, 0), ("b", 0, 0), ("a", 1, 0), ("a", 0, 1))
    }
    assert len(views) == 4


def test_the_numbers_of_a_view_are_those_of_version_1():
    """A change of what is drawn needs another version in the recipe's name: old caches could not be replayed."""
    recipe, image = ViewRecipe(), picture(12, 12)
    seed = f"{recipe}\nkey\n3\n0"
    drawn = [
        int.from_bytes(hashlib.sha256(f"{seed}\n{number}".encode()).digest()[:8], "big") / 2**64 for number in range(4)
    ]
    expected = image
    for which, sign in (drawn[:2], drawn[2:]):
        expected = COLOURS_KEPT[int(which * 9)].apply(expected, 1 if sign < 0.5 else -1)
    np.testing.assert_array_equal(array(recipe(image, "key", 3)), array(expected))
    assert [operation.name for operation in COLOURS_KEPT] == [
        "shear x", "shear y", "shift x", "shift y", "rotate", "sharpness", "saturation", "contrast", "brightness"
    ]  # fmt: skip


def hue(pixels):
    return array(Image.fromarray(pixels).convert("HSV"))[..., 0].astype(int)


COLOURS = {
    "red": (255, 0, 0),
    "orange": (255, 165, 0),
    "yellow": (255, 255, 0),
    "green": (0, 160, 0),
    "blue": (0, 0, 255),
}


def test_kept_colours_keep_their_hue_and_free_ones_do_not():
    """Of five flat colours; orange turns yellow where colours are free."""
    pixels = np.repeat(np.array(list(COLOURS.values()), np.uint8)[None], 8, axis=0).repeat(8, axis=1)
    image = Image.fromarray(pixels)
    for name in ("saturation", "contrast", "brightness"):
        off = np.abs(hue(array(KEPT[name](image, 1))) - hue(pixels))
        assert np.minimum(off, 256 - off).max() <= 2
    brighter = array(FREE["brightness"](image, 1))
    assert np.abs(hue(brighter) - hue(pixels)).max() > 5
    assert not {"equalize", "autocontrast", "solarize", "posterize"} & set(KEPT)


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe is not None and recipe.sides])
def test_kept_sides_leave_left_at_the_left(name):
    """A white left half stays brighter than the black right half in every view."""
    pixels = np.zeros((36, 36, 3), np.uint8)
    pixels[:, :18] = 255
    pixels[::5, ::5] = 90
    for view in range(60):
        found = array(RECIPES[name](Image.fromarray(pixels), "key", view)).astype(int)
        if "published" not in name:
            assert found[:, :12].mean() > found[:, -12:].mean()
    assert RECIPES[name].sides


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_read_from_its_name_and_from_what_the_specification_says(name):
    recipe = parse_recipe(name)
    assert parse_recipe(recipe_name(recipe)) == recipe == RECIPES[name]
    assert (recipe is None) == (recipe_name(recipe) == AS_PROCESSED)
    assert recipe is None or " v1, colours " in str(recipe)


@pytest.mark.parametrize(
    "text",
    ["example 1", "", "randaugment-2-9 v2, colours kept, sides kept", "randaugment-2-9 v1, colours kept",
     "randaugment-2-9 v1, colours kept, sides kept, cropped, blurred", "plain v1, colours Kept, sides kept",
     "randaugment-2-9 v1, colours kept, sides kept\n"],
)  # fmt: skip
def test_an_unknown_recipe_is_refused(text):
    with pytest.raises(InputError, match="expected a recipe of views that this version can replay"):
        parse_recipe(text)


# Which view, and what is checked.


@given(seed=st.integers(0, 99), key=KEYS, views=st.integers(1, 9), block=st.integers(0, 5))
def test_each_view_comes_once_in_so_many_epochs(seed, key, views, block):
    epochs = range(block * views, (block + 1) * views)
    assert sorted(view_of(seed, epoch, key, views) for epoch in epochs) == list(range(views))


def test_samples_and_seeds_begin_with_different_views():
    counts = np.bincount([view_of(0, 0, f"key-{number}", 4) for number in range(2000)])
    assert counts.min() > 420
    assert [view_of(0, 0, f"{number}", 4) for number in range(40)] != [
        view_of(1, 0, f"{number}", 4) for number in range(40)
    ]


def test_about_one_sample_in_a_hundred_is_checked():
    assert 70 < sum(is_spot_checked(f"key-{number}") for number in range(10_000)) < 130


@given(place=st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(0, 7)), by=st.integers(1, 255))
def test_any_changed_pixel_changes_the_hash(place, by):
    levels = np.random.default_rng(0).integers(0, 256, (3, 6, 8), dtype=np.uint8)
    other = levels.copy()
    other[place] ^= by
    assert pixel_hash(levels) != pixel_hash(other)
    assert pixel_hash(levels) != pixel_hash(levels.reshape(3, 8, 6))
    expected = hashlib.sha256((6).to_bytes(4, "little") + (8).to_bytes(4, "little") + levels.tobytes()).digest()
    assert pixel_hash(levels) == expected[:8]


@pytest.mark.parametrize(
    "options",
    [{}, {"do_normalize": False}, {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
     {"do_rescale": False, "do_normalize": False}],
)  # fmt: skip
def test_levels_are_the_pixels_that_were_processed(options):
    preprocessor = Preprocessor(vilt_processor(**options), 12, 12)
    image = picture(36, 24)
    pixels = preprocessor.pixels(image)
    expected = np.moveaxis(array(image), -1, 0)
    np.testing.assert_array_equal(preprocessor.levels(pixels), expected)
    # Rounding of floats does not reach it.
    np.testing.assert_array_equal(preprocessor.levels(np.nextafter(pixels, np.float32(1e9))), expected)


def test_rows_of_the_group_are_sorted_and_each_is_there_once():
    """Two texts of one sample saw the same pixels."""
    sample, view = [0, 0, 0, 0, 1, 1], [0, 1, 0, 1, 0, 1]
    hashes = np.stack(
        [
            np.full((2, 8), 10 * s + v, np.uint8) + np.array([[0], [100]], np.uint8)
            for s, v in zip(sample, view, strict=True)
        ]
    )
    arrays = group_arrays(sample, view, hashes)
    rows = list(zip(*(arrays[f"views/{name}"].tolist() for name in ("sample", "image", "view")), strict=True))
    assert rows == [(s, i, v) for s in range(2) for i in range(2) for v in range(2)]
    assert arrays["views/pixels"][:, 0].tolist() == [10 * s + v + 100 * i for s, i, v in rows]
    assert [arrays[f"views/{name}"].dtype.name for name in ("sample", "image", "view", "pixels")] == [
        "uint32", "uint8", "uint16", "uint8"
    ]  # fmt: skip

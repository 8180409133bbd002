"""Makes a small real data set in COCO's format: handwritten digits in cluttered photographs.

Every image is a crop of a photograph that ships inside scikit-image or scikit-learn, with pieces of
other photographs and a horse's silhouette as clutter, and handwritten digits of scikit-learn as
instances: of many sizes, rotated, coloured, occluding each other. Training and validation share
neither photographs nor digits. The same arguments give the same bytes.

    OUT/annotations/instances_{train,val}.json   exact masks, run-length encoded
    OUT/{train,val}/000000.png                   images
    OUT/semantic/{train,val}/000000.png          semantic maps: 0 background, 1 + digit
    OUT/foreground/{train,val}/000000.png        the same of two classes: 0 background, 1 any digit
    OUT/digits/{train,val}/0/000001.png          the digits cut out, one folder for every class

Example:
    python tools/dataset_converters/make_mini_coco.py data/mini_coco --train 1000 --val 200 --seed 0
"""

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

try:
    import skimage
    import sklearn.datasets
except ModuleNotFoundError as error:
    raise SystemExit(
        f"{error.name} is not installed; its images are the data. Run: pip install 'mmkw[dev]'"
    ) from None

PHOTOGRAPHS = {
    'train': (
        'astronaut.png',
        'chelsea.png',
        'motorcycle_left.png',
        'ihc.png',
        'brick.png',
        'grass.png',
        'camera.png',
        'china.jpg',
    ),
    'val': ('coffee.png', 'rocket.jpg', 'coins.png', 'gravel.png', 'flower.jpg'),
}
CLASSES = tuple(f'digit {i}' for i in range(10))
LONG_SIDE = 128
DIGIT_SIZES = (24, 64)
MAX_DIGITS = 5
MAX_CLUTTER = 4
# A digit that shows less of itself than this could not be told from others, and is left out.
MIN_VISIBLE = 0.5


@dataclass
class Material:
    """What the images of one split are made of."""

    photographs: list[np.ndarray]
    digits: np.ndarray
    labels: np.ndarray
    silhouette: np.ndarray


@dataclass
class Scene:
    """One image, its instances' visible masks and classes."""

    image: np.ndarray
    masks: list[np.ndarray]
    labels: list[int]


def load_material(split: str) -> Material:
    """Reads the photographs and digits of a split from the installed packages."""
    folders = [
        Path(skimage.__file__).parent / 'data',
        Path(sklearn.datasets.__file__).parent / 'images',
    ]

    def read(name: str, flag: int = cv2.IMREAD_COLOR) -> np.ndarray:
        for folder in folders:
            if (folder / name).is_file():
                return cv2.imread(str(folder / name), flag)
        raise SystemExit(f'{name} is in none of {folders}. Run: pip install -U scikit-image')

    digits = sklearn.datasets.load_digits()
    # Every fifth digit is held out.
    held_out = np.arange(len(digits.images)) % 5 == 0
    chosen = held_out if split == 'val' else ~held_out
    return Material(
        [read(name) for name in PHOTOGRAPHS[split]],
        digits.images[chosen].astype(np.float32) / 16,
        digits.target[chosen],
        read('horse.png', cv2.IMREAD_GRAYSCALE) < 128,
    )


def make_scene(material: Material, rng: np.random.Generator) -> Scene:
    """Composes one image."""
    height, width = sorted(rng.integers(LONG_SIDE * 3 // 4, LONG_SIDE + 1, 2))
    if rng.random() < 0.5:
        height, width = width, height
    image = random_crop(material, height, width, rng)

    for _ in range(rng.integers(MAX_CLUTTER + 1)):
        mask = clutter_mask(material, rng)
        patch = random_crop(material, *mask.shape, rng)
        where = place(mask, image.shape[:2], rng)
        image[where] = patch[mask]

    masks, labels, areas = [], [], []
    for _ in range(rng.integers(1, MAX_DIGITS + 1)):
        index = rng.integers(len(material.digits))
        ink = draw_digit(material.digits[index], rng)
        where = place(ink > 0.4, image.shape[:2], rng)
        for mask in masks:
            mask[where] = False
        paint(image, where, rng)
        mask = np.zeros(image.shape[:2], bool)
        mask[where] = True
        masks.append(mask)
        labels.append(int(material.labels[index]))
        areas.append(len(where[0]))
    kept = [i for i, mask in enumerate(masks) if mask.sum() >= MIN_VISIBLE * areas[i]]

    noise = rng.normal(0, rng.uniform(0, 10), image.shape)
    image = np.clip(image + noise, 0, 255).astype(np.uint8)
    return Scene(image, [masks[i] for i in kept], [labels[i] for i in kept])


def random_crop(
    material: Material, height: int, width: int, rng: np.random.Generator
) -> np.ndarray:
    """A crop of a random photograph at a random scale, perhaps mirrored."""
    photograph = material.photographs[rng.integers(len(material.photographs))]
    smallest = max(height / photograph.shape[0], width / photograph.shape[1])
    scale = rng.uniform(smallest, max(1.0, smallest))
    crop_height, crop_width = int(height / scale), int(width / scale)
    top = rng.integers(photograph.shape[0] - crop_height + 1)
    left = rng.integers(photograph.shape[1] - crop_width + 1)
    crop = photograph[top : top + crop_height, left : left + crop_width]
    crop = cv2.resize(crop, (int(width), int(height)), interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(crop[:, ::-1] if rng.random() < 0.5 else crop)


def clutter_mask(material: Material, rng: np.random.Generator) -> np.ndarray:
    """The shape of a distractor: a blob or the silhouette of a horse."""
    size = int(rng.integers(*DIGIT_SIZES))
    if rng.random() < 0.3:
        shape = material.silhouette.astype(np.float32)
        return cv2.resize(shape, (size, size), interpolation=cv2.INTER_AREA) > 0.5
    noise = rng.random((4, 4)).astype(np.float32)
    blob = cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)
    return blob > np.median(blob)


def draw_digit(digit: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The ink of a digit, enlarged, sheared and rotated: values from 0 to 1."""
    size = int(rng.integers(*DIGIT_SIZES))
    ink = cv2.resize(np.pad(digit, 2), (size, size), interpolation=cv2.INTER_CUBIC)
    turn = cv2.getRotationMatrix2D((size / 2, size / 2), rng.uniform(-20, 20), 1)
    turn[0, 1] += rng.uniform(-0.15, 0.15)
    return cv2.warpAffine(ink, turn, (size, size))


def place(mask: np.ndarray, shape: tuple[int, int], rng: np.random.Generator) -> tuple:
    """Puts a mask somewhere into an image; returns the rows and columns of its pixels."""
    rows, columns = np.nonzero(mask)
    top = rng.integers(-rows.min(), max(shape[0] - rows.max(), 1 - rows.min()))
    left = rng.integers(-columns.min(), max(shape[1] - columns.max(), 1 - columns.min()))
    return rows + top, columns + left


def paint(image: np.ndarray, where: tuple, rng: np.random.Generator) -> None:
    """Paints pixels in a colour that differs from what lies around, with some texture."""
    behind = image[where].mean(0)
    colour = rng.uniform(0, 255, 3)
    while np.abs(colour - behind).mean() < 60:
        colour = rng.uniform(0, 255, 3)
    texture = rng.normal(0, 12, (len(where[0]), 1))
    image[where] = np.clip(colour + texture, 0, 255)


def run_length(mask: np.ndarray) -> dict:
    """COCO's uncompressed run-length encoding: runs of 0 and 1 by turns, down the columns."""
    flat = mask.ravel(order='F').astype(np.int8)
    changes = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return dict(size=list(mask.shape), counts=[0, *runs] if flat[0] else runs)


def make_split(out: Path, split: str, count: int, seed: int) -> None:
    """Writes the images, semantic maps and annotations of one split."""
    material = load_material(split)
    folders = out / split, out / 'semantic' / split, out / 'foreground' / split
    digits = [out / 'digits' / split / str(label) for label in range(len(CLASSES))]
    for folder in (*folders, *digits):
        folder.mkdir(parents=True)
    images, annotations = [], []
    for image_id in range(count):
        # A stream an image: more images leave the earlier ones as they were.
        rng = np.random.default_rng([seed, split == 'val', image_id])
        scene = make_scene(material, rng)
        name = f'{image_id:06d}.png'
        height, width = scene.image.shape[:2]
        images.append(dict(id=image_id, file_name=name, height=height, width=width))
        semantic = np.zeros((height, width), np.uint8)
        for mask, label in zip(scene.masks, scene.labels):
            semantic[mask] = 1 + label
            x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
            cut = scene.image[
                max(y - h // 8, 0) : y + h + h // 8, max(x - w // 8, 0) : x + w + w // 8
            ]
            cv2.imwrite(str(digits[label] / f'{len(annotations) + 1:06d}.png'), cut)
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=image_id,
                    category_id=label + 1,
                    bbox=[x, y, w, h],
                    area=int(mask.sum()),
                    iscrowd=0,
                    segmentation=run_length(mask),
                )
            )
        cv2.imwrite(str(folders[0] / name), scene.image)
        cv2.imwrite(str(folders[1] / name), semantic)
        cv2.imwrite(str(folders[2] / name), np.minimum(semantic, 1))

    (out / 'annotations').mkdir(exist_ok=True)
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)]
    coco = dict(images=images, annotations=annotations, categories=categories)
    (out / 'annotations' / f'instances_{split}.json').write_text(json.dumps(coco))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('out', type=Path, help='folder to make')
    parser.add_argument('--train', type=int, default=1000, help='training images (default: 1000)')
    parser.add_argument('--val', type=int, default=200, help='validation images (default: 200)')
    parser.add_argument('--seed', type=int, default=0, help='not negative (default: 0)')
    args = parser.parse_args(argv)
    for name, lowest in (('train', 1), ('val', 1), ('seed', 0)):
        if getattr(args, name) < lowest:
            parser.error(f'--{name} must be at least {lowest}, got {getattr(args, name)}')
    return args


def main(argv: list[str] | None = None) -> None:
    """Makes the data set, or finds it made."""
    args = parse_args(argv)
    # The version changes with what the files hold.
    recipe = dict(train=args.train, val=args.val, seed=args.seed, version=3)
    record = args.out / 'recipe.json'
    if record.is_file() and json.loads(record.read_text()) == recipe:
        print(f'{args.out} is there already: {recipe}')
        return
    if args.out.exists():
        sys.exit(f'{args.out} exists and holds something else. Remove it or name another folder.')

    # Renamed when complete, so that an interruption leaves no half of a data set.
    partial = args.out.with_name(args.out.name + '.partial')
    shutil.rmtree(partial, ignore_errors=True)
    for split in ('train', 'val'):
        make_split(partial, split, recipe[split], args.seed)
    (partial / record.name).write_text(json.dumps(recipe))
    partial.rename(args.out)
    print(f'{args.out}: {args.train} training and {args.val} validation images')


if __name__ == '__main__':
    main()

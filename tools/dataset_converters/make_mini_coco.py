"""Makes a small real data set in COCO's format: objects in cluttered photographs.

Every image is a crop of a photograph that ships inside scikit-image or scikit-learn, with pieces of
other photographs and a horse's silhouette as clutter. The instances are handwritten digits of
scikit-learn: of many sizes, rotated, coloured, occluding each other. With ``--stamps`` they are
harder: animals, plants, things and vehicles of ten classes, cut out of photographs and drawings,
from Tux Paint's collection of stamps. Training and validation share neither photographs nor digits
nor stamps; nor does the test split, but for its digits, which are those of the validation. With
``--conditions`` every image is taken under one of four: clear, noisy, blurred or dark. The scenes
and masks are those without. The same arguments give the same bytes.

    OUT/annotations/instances_{train,val,test}.json   exact masks, run-length encoded
    OUT/annotations/instances_test_dark.json          of the images under one condition
    OUT/{train,val,test}/000000.png                   images
    OUT/semantic/{train,val,test}/000000.png          semantic maps: 0 background, 1 + class
    OUT/foreground/{train,val,test}/000000.png        of two classes: 0 background, 1 any object
    OUT/digits/{train,val,test}/0/000001.png          objects cut out, one folder for every class

Examples:
    python tools/dataset_converters/make_mini_coco.py data/mini_coco --train 1000 --val 200 --seed 0
    python tools/dataset_converters/make_mini_coco.py data/mini_stamps --stamps STAMPS --test 400
    python tools/dataset_converters/make_mini_coco.py data/mini_conditions --conditions --test 400

STAMPS is the folder ``usr/share/tuxpaint/stamps`` of Debian's package tuxpaint-stamps-default:
``apt-get download tuxpaint-stamps-default && dpkg-deb -x tuxpaint-stamps-default*.deb .``
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
    'test': ('retina.jpg', 'hubble_deep_field.jpg', 'clock_motion.png', 'moon.png', 'page.png'),
}
# The folders of Tux Paint's stamps, each a class.
STAMPS = {
    'mammal': 'animals/mammals',
    'bird': 'animals/birds',
    'insect': 'animals/insects',
    'fruit': 'food/fruit',
    'vegetable': 'food/vegetables',
    'flower': 'plants/flowers',
    'house': 'town/houses',
    'money': 'symbols/money',
    'road sign': 'town/roadsigns',
    'vehicle': 'vehicles',
}
CONDITIONS = ('clear', 'noisy', 'blurred', 'dark')
LONG_SIDE = 128
CLUTTER_SIZES = (24, 64)
MAX_CLUTTER = 4
# An object that shows less of itself than this could not be told from others, and is left out.
MIN_VISIBLE = 0.5


class Digits:
    """Handwritten digits; every fifth is held out."""

    classes = tuple(f'digit {i}' for i in range(10))
    sizes = (24, 64)
    most = 5

    def __init__(self, split: str) -> None:
        digits = sklearn.datasets.load_digits()
        held_out = np.arange(len(digits.images)) % 5 == 0
        chosen = ~held_out if split == 'train' else held_out
        self.images = digits.images[chosen].astype(np.float32) / 16
        self.labels = digits.target[chosen]

    def put(self, image: np.ndarray, rng: np.random.Generator) -> tuple[tuple, int]:
        """Puts an object into an image; returns the rows and columns of its pixels, and its class.

        Args:
            image: ``Array[height, width, 3]`` of bytes; it is changed.
            rng: What decides.
        """
        index = rng.integers(len(self.images))
        ink = turned(np.pad(self.images[index], 2), rng.integers(*self.sizes), rng)
        where, _ = place(ink > 0.4, image.shape[:2], rng)
        paint(image, where, rng)
        return where, int(self.labels[index])


class Stamps:
    """Cut-out photographs and drawings of things; every fifth is for validation, as many to test.

    Args:
        split: ``train``, ``val`` or ``test``.
        folder: Of Tux Paint's stamps.
    """

    classes = tuple(STAMPS)
    sizes = (28, 80)
    most = 4

    def __init__(self, split: str, folder: Path) -> None:
        chosen = {'val': [0], 'test': [2], 'train': [1, 3, 4]}[split]
        self.images: list[list[np.ndarray]] = []
        for name, kind in STAMPS.items():
            files = sorted((folder / kind).glob('**/*.png'))
            pictures = [cv2.imread(str(file), cv2.IMREAD_UNCHANGED) for file in files]
            pictures = [p for p in pictures if p is not None and p.ndim == 3 and p.shape[2] == 4]
            if len(pictures) < 5:
                raise SystemExit(
                    f'{folder / kind} has {len(pictures)} stamps for the class {name!r}, of which '
                    'it takes five. Give --stamps the folder usr/share/tuxpaint/stamps of the '
                    'package tuxpaint-stamps-default.'
                )
            self.images.append([p for i, p in enumerate(pictures) if i % 5 in chosen])

    def put(self, image: np.ndarray, rng: np.random.Generator) -> tuple[tuple, int]:
        """Puts an object into an image; see :class:`Digits`."""
        label = int(rng.integers(len(self.images)))
        stamp = self.images[label][rng.integers(len(self.images[label]))]
        # Colours of transparent pixels mean nothing, and would shine through at the edges.
        opaque = stamp[..., 3:] / np.float32(255)
        stamp = np.concatenate([stamp[..., :3] * opaque, opaque], 2)
        stamp = turned(stamp, rng.integers(*self.sizes), rng)
        if rng.random() < 0.5:
            stamp = np.ascontiguousarray(stamp[:, ::-1])
        where, pixels = place(stamp[..., 3] > 0.5, image.shape[:2], rng)
        colours = stamp[pixels]
        light = rng.uniform(0.6, 1.2)
        image[where] = np.clip(light * colours[:, :3] / colours[:, 3:], 0, 255)
        return where, label


@dataclass
class Material:
    """What the images of one split are made of."""

    photographs: list[np.ndarray]
    objects: Digits | Stamps
    silhouette: np.ndarray


@dataclass
class Scene:
    """One image, its instances' visible masks and classes."""

    image: np.ndarray
    masks: list[np.ndarray]
    labels: list[int]


def load_material(split: str, stamps: Path | None) -> Material:
    """Reads the photographs and objects of a split.

    Args:
        split: ``train``, ``val`` or ``test``.
        stamps: The folder of stamps; digits without it.
    """
    folders = [
        Path(skimage.__file__).parent / 'data',
        Path(sklearn.datasets.__file__).parent / 'images',
    ]

    def read(name: str, flag: int = cv2.IMREAD_COLOR) -> np.ndarray:
        for folder in folders:
            if (folder / name).is_file():
                return cv2.imread(str(folder / name), flag)
        raise SystemExit(f'{name} is in none of {folders}. Run: pip install -U scikit-image')

    return Material(
        [read(name) for name in PHOTOGRAPHS[split]],
        Stamps(split, stamps) if stamps else Digits(split),
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
        where, _ = place(mask, image.shape[:2], rng)
        image[where] = patch[mask]

    masks, labels, areas = [], [], []
    for _ in range(rng.integers(1, material.objects.most + 1)):
        where, label = material.objects.put(image, rng)
        for mask in masks:
            mask[where] = False
        mask = np.zeros(image.shape[:2], bool)
        mask[where] = True
        masks.append(mask)
        labels.append(label)
        areas.append(len(where[0]))
    kept = [i for i, mask in enumerate(masks) if mask.sum() >= MIN_VISIBLE * areas[i]]

    noise = rng.normal(0, rng.uniform(0, 10), image.shape)
    image = np.clip(image + noise, 0, 255).astype(np.uint8)
    return Scene(image, [masks[i] for i in kept], [labels[i] for i in kept])


def under_condition(image: np.ndarray, condition: str, rng: np.random.Generator) -> np.ndarray:
    """Takes a picture under a condition.

    Args:
        image: ``Array[height, width, 3]`` of bytes.
        condition: One of ``CONDITIONS``.
        rng: What decides how much.
    """
    taken = image.astype(np.float32)
    if condition == 'noisy':
        taken += rng.normal(0, rng.uniform(40, 70), image.shape)
    elif condition == 'blurred':
        taken = cv2.GaussianBlur(taken, (0, 0), rng.uniform(1.5, 2.5))
    elif condition == 'dark':
        taken = rng.uniform(0.1, 0.2) * taken + rng.normal(0, 3, image.shape)
    return np.clip(taken, 0, 255).astype(np.uint8)


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
    size = int(rng.integers(*CLUTTER_SIZES))
    if rng.random() < 0.3:
        shape = material.silhouette.astype(np.float32)
        return cv2.resize(shape, (size, size), interpolation=cv2.INTER_AREA) > 0.5
    noise = rng.random((4, 4)).astype(np.float32)
    blob = cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)
    return blob > np.median(blob)


def turned(picture: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A picture of this size at its longer side, sheared and rotated."""
    scale = size / max(picture.shape[:2])
    width, height = (max(int(scale * side), 1) for side in picture.shape[1::-1])
    smaller = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    picture = cv2.resize(picture, (width, height), interpolation=smaller)
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), rng.uniform(-20, 20), 1)
    turn[0, 1] += rng.uniform(-0.15, 0.15)
    return cv2.warpAffine(picture, turn, (width, height))


def place(mask: np.ndarray, shape: tuple[int, int], rng: np.random.Generator) -> tuple:
    """Puts a mask somewhere into an image.

    Args:
        mask: What is to lie inside the image, at least by a pixel.
        shape: Height and width of the image.
        rng: What decides.

    Returns:
        Rows and columns of its pixels in the image, and the same in the mask.
    """
    rows, columns = np.nonzero(mask)
    top = rng.integers(-rows.min(), max(shape[0] - rows.max(), 1 - rows.min()))
    left = rng.integers(-columns.min(), max(shape[1] - columns.max(), 1 - columns.min()))
    return (rows + top, columns + left), (rows, columns)


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


def make_split(
    out: Path, split: str, count: int, seed: int, stamps: Path | None, conditions: bool
) -> None:
    """Writes the images, semantic maps and annotations of one split."""
    material = load_material(split, stamps)
    classes = material.objects.classes
    folders = out / split, out / 'semantic' / split, out / 'foreground' / split
    digits = [out / 'digits' / split / str(label) for label in range(len(classes))]
    for folder in (*folders, *digits):
        folder.mkdir(parents=True)
    images, annotations = [], []
    # The images of every file of annotations.
    parts = {'': list(range(count))} | {f'_{name}': [] for name in CONDITIONS if conditions}
    for image_id in range(count):
        # A stream an image: more images leave the earlier ones as they were.
        rng = np.random.default_rng([seed, list(PHOTOGRAPHS).index(split), image_id])
        scene = make_scene(material, rng)
        if conditions:
            condition = str(rng.choice(CONDITIONS))
            scene.image = under_condition(scene.image, condition, rng)
            parts[f'_{condition}'].append(image_id)
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
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(classes)]
    for part, ids in parts.items():
        coco = dict(
            images=[image for image in images if image['id'] in ids],
            annotations=[found for found in annotations if found['image_id'] in ids],
            categories=categories,
        )
        (out / 'annotations' / f'instances_{split}{part}.json').write_text(json.dumps(coco))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('out', type=Path, help='folder to make')
    parser.add_argument('--train', type=int, default=1000, help='training images (default: 1000)')
    parser.add_argument('--val', type=int, default=200, help='validation images (default: 200)')
    parser.add_argument('--test', type=int, default=0, help='test images (default: none)')
    parser.add_argument('--stamps', type=Path, help="Tux Paint's folder (default: digits)")
    parser.add_argument(
        '--conditions', action='store_true', help='images are clear, noisy, blurred or dark'
    )
    parser.add_argument('--seed', type=int, default=0, help='not negative (default: 0)')
    args = parser.parse_args(argv)
    for name, lowest in (('train', 1), ('val', 1), ('test', 0), ('seed', 0)):
        if getattr(args, name) < lowest:
            parser.error(f'--{name} must be at least {lowest}, got {getattr(args, name)}')
    return args


def main(argv: list[str] | None = None) -> None:
    """Makes the data set, or finds it made."""
    args = parse_args(argv)
    # The version changes with what the files hold.
    splits = {split: getattr(args, split) for split in PHOTOGRAPHS if getattr(args, split)}
    recipe = dict(**splits, seed=args.seed, version=3)
    if args.stamps:
        recipe['objects'] = 'stamps'
    if args.conditions:
        recipe['conditions'] = True
    record = args.out / 'recipe.json'
    made = json.loads(record.read_text()) if record.is_file() else {}
    # What has a test split as well is as good as what has none.
    same = all(made.get(name) == recipe.get(name) for name in ('objects', 'conditions'))
    if made and made | recipe == made and same:
        print(f'{args.out} is there already: {made}')
        return
    if args.out.exists():
        sys.exit(f'{args.out} exists and holds something else. Remove it or name another folder.')

    # Renamed when complete, so that an interruption leaves no half of a data set.
    partial = args.out.with_name(args.out.name + '.partial')
    shutil.rmtree(partial, ignore_errors=True)
    for split, count in splits.items():
        make_split(partial, split, count, args.seed, args.stamps, args.conditions)
    (partial / record.name).write_text(json.dumps(recipe))
    partial.rename(args.out)
    print(f'{args.out}: images ' + ', '.join(f'{count} {name}' for name, count in splits.items()))


if __name__ == '__main__':
    main()

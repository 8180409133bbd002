"""The data set is exact, deterministic and readable by everyone it is for."""

import hashlib
import itertools
import json
import runpy
import sys

import cv2
import numpy as np
import pytest
from command_util import run


def make(root, out, *arguments):
    script = 'tools/dataset_converters/make_mini_coco.py'
    return run(root, sys.executable, script, out, *arguments)[0]


def digest(folder):
    files = sorted(p for p in folder.rglob('*') if p.is_file() and p.name != 'recipe.json')
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_same_seed_same_bytes(root, mini_coco, tmp_path):
    first = digest(mini_coco)
    assert make(root, tmp_path / 'a', '--train', '4', '--val', '2', '--seed', '1').returncode == 0
    assert digest(tmp_path / 'a') == first
    # More images leave the earlier ones as they were; another seed gives others.
    assert make(root, tmp_path / 'b', '--train', '5', '--val', '2', '--seed', '1').returncode == 0
    assert digest(tmp_path / 'b')['train/000003.png'] == first['train/000003.png']
    assert make(root, tmp_path / 'c', '--train', '4', '--val', '2', '--seed', '2').returncode == 0
    assert digest(tmp_path / 'c')['train/000000.png'] != first['train/000000.png']
    assert first['train/000000.png'] != first['val/000000.png']
    # A test split changes nothing of the others, and is found where it is not asked for.
    with_test = [tmp_path / 'd', '--train', '4', '--val', '2', '--seed', '1']
    assert make(root, *with_test, '--test', '2').returncode == 0
    both = digest(tmp_path / 'd')
    assert first.items() <= both.items()
    assert both['test/000000.png'] not in first.values()
    again = make(root, *with_test)
    assert again.returncode == 0 and 'is there already' in again.stdout


@pytest.mark.parametrize('split', ['train', 'val'])
def test_pycocotools_reads_exact_masks(mini_coco, split):
    COCO = pytest.importorskip('pycocotools.coco', reason='comes with MMDetection').COCO

    coco = COCO(str(mini_coco / f'annotations/instances_{split}.json'))
    assert len(coco.getAnnIds()) > 0
    for image in coco.loadImgs(coco.getImgIds()):
        pixels = cv2.imread(str(mini_coco / split / image['file_name']))
        assert pixels.shape == (image['height'], image['width'], 3)
        semantic = cv2.imread(str(mini_coco / 'semantic' / split / image['file_name']), -1)
        assert semantic.dtype == np.uint8
        union = np.zeros(semantic.shape, np.uint8)
        for annotation in coco.loadAnns(coco.getAnnIds(image['id'])):
            mask = coco.annToMask(annotation)
            assert mask.sum() == annotation['area'] > 0
            assert annotation['bbox'] == list(cv2.boundingRect(mask))
            # Instances occlude each other: no pixel belongs to two.
            assert not (union[mask > 0]).any()
            union[mask > 0] = annotation['category_id']
        np.testing.assert_array_equal(semantic, union)
        foreground = cv2.imread(str(mini_coco / 'foreground' / split / image['file_name']), -1)
        np.testing.assert_array_equal(foreground, union > 0)


def test_mmdet_reads_it(mini_coco):
    pytest.importorskip('mmdet')
    from mmdet.datasets import CocoDataset
    from mmengine.registry import init_default_scope

    init_default_scope('mmdet')

    dataset = CocoDataset(
        data_root=f'{mini_coco}/',
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='train/'),
        metainfo=dict(classes=tuple(f'digit {i}' for i in range(10))),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
        ],
    )
    categories = json.loads((mini_coco / 'annotations/instances_train.json').read_text())
    names = {c['id']: c['name'] for c in categories['categories']}
    assert list(names.values()) == list(dataset.metainfo['classes'])
    assert len(dataset) == 4
    for item in (dataset[i] for i in range(4)):
        assert len(item['gt_masks']) == len(item['gt_bboxes_labels']) > 0
        areas = item['gt_masks'].areas
        boxes = item['gt_bboxes'].tensor
        assert all(0 < a <= (b[2] - b[0]) * (b[3] - b[1]) for a, b in zip(areas, boxes))


@pytest.fixture(scope='module')
def stamps(root, tmp_path_factory):
    """Stamps like Tux Paint's: eight of every class, each of its own colour."""
    script = runpy.run_path(str(root / 'tools/dataset_converters/make_mini_coco.py'))
    folder = tmp_path_factory.mktemp('stamps')
    rng = np.random.default_rng(0)
    for place in script['STAMPS'].values():
        (folder / place).mkdir(parents=True)
        for number in range(8):
            stamp = np.zeros((40, 60, 4), np.uint8)
            stamp[5:35, 10:50] = (*rng.integers(256, size=3), 255)
            cv2.imwrite(str(folder / place / f'{number}.png'), stamp)
    return script, folder


def test_splits_share_no_stamps(stamps):
    script, folder = stamps
    splits = [script['Stamps'](split, folder) for split in ('train', 'val', 'test')]
    for number in range(len(script['STAMPS'])):
        colours = [{tuple(stamp[20, 30]) for stamp in split.images[number]} for split in splits]
        assert len(set.union(*colours)) == sum(map(len, colours)) == 8
        assert all(colours)


def test_stamps_are_exact(root, stamps, tmp_path):
    script, folder = stamps
    options = ['--train', '6', '--val', '2', '--test', '2', '--stamps', folder]
    assert make(root, tmp_path / 'a', *options).returncode == 0
    assert make(root, tmp_path / 'b', *options).returncode == 0
    assert digest(tmp_path / 'a') == digest(tmp_path / 'b')
    content = json.loads((tmp_path / 'a/annotations/instances_train.json').read_text())
    assert [category['name'] for category in content['categories']] == list(script['STAMPS'])
    colours = [
        stamp[20, 30, :3] for own in script['Stamps']('train', folder).images for stamp in own
    ]
    for annotation in content['annotations']:
        image = cv2.imread(str(tmp_path / f'a/train/{annotation["image_id"]:06d}.png'))
        runs = annotation['segmentation']
        pixels = np.repeat(np.arange(len(runs['counts'])) % 2, runs['counts'])
        shown = np.median(image[pixels.reshape(runs['size'], order='F') > 0], 0)
        # A stamp of one colour shows this colour, in more or less light.
        lights = [shown[colour > 60] / colour[colour > 60] for colour in colours]
        assert any(light.size and np.ptp(light) < 0.2 for light in lights)
    # Digits in the same place are something else.
    assert make(root, tmp_path / 'a', *options[:6]).returncode != 0


def test_conditions_change_images_alone(root, mini_coco, tmp_path):
    options = ['--train', '4', '--val', '2', '--seed', '1']
    assert make(root, tmp_path / 'a', *options, '--conditions').returncode == 0
    clear, taken = digest(mini_coco), digest(tmp_path / 'a')
    changed = {name for name in clear if taken[name] != clear[name]}
    parts = {
        f'annotations/instances_{split}_{condition}.json'
        for split in ('train', 'val')
        for condition in ('clear', 'noisy', 'blurred', 'dark')
    }
    assert taken.keys() - clear.keys() == parts and not clear.keys() - taken.keys()
    assert changed and {name.split('/')[0] for name in changed} <= {'train', 'val', 'digits'}
    # Each image is under one condition, with what it shows.
    for kind in ('images', 'annotations'):
        whole, *found = (
            json.loads((tmp_path / f'a/annotations/instances_train{part}.json').read_text())[kind]
            for part in ('', '_clear', '_noisy', '_blurred', '_dark')
        )
        assert sorted(itertools.chain(*found), key=lambda one: one['id']) == whole
    # Each is something else than the other.
    assert 'already' in make(root, tmp_path / 'a', *options, '--conditions').stdout
    assert make(root, tmp_path / 'a', *options).returncode != 0


def test_every_condition_is_met(root):
    script = runpy.run_path(str(root / 'tools/dataset_converters/make_mini_coco.py'))
    scene = np.random.default_rng(0).integers(60, 200, (40, 40, 3)).astype(np.uint8)
    found = []
    asked = [kind for kind in script['CONDITIONS'] for _ in range(6)]
    for seed, kind in enumerate(asked):
        taken, again = (
            script['under_condition'](scene, kind, np.random.default_rng(seed)) for _ in range(2)
        )
        np.testing.assert_array_equal(taken, again)
        assert taken.dtype == np.uint8 and taken.shape == scene.shape
        # How bright it is, and how much it varies from pixel to pixel, relative to the scene.
        brightness = taken.mean() / scene.mean()
        edges = (
            np.diff(taken.astype(float), axis=0).std() / np.diff(scene.astype(float), axis=0).std()
        )
        if brightness < 0.3:
            found.append('dark')
        elif edges < 0.5:
            found.append('blurred')
        else:
            found.append('noisy' if edges > 1.2 else 'clear')
        assert found[-1] == 'dark' or 0.9 < brightness < 1.1
        assert (found[-1] == 'clear') == np.array_equal(taken, scene)
    assert found == asked


def test_a_folder_without_stamps_is_refused(root, tmp_path):
    result = make(root, tmp_path / 'a', '--stamps', tmp_path)
    assert result.returncode != 0 and 'Give --stamps' in result.stderr
    assert not (tmp_path / 'a').exists()


def test_made_twice_is_made_once(root, mini_coco):
    result = make(root, mini_coco, '--train', '4', '--val', '2', '--seed', '1')
    assert result.returncode == 0 and 'is there already' in result.stdout


def test_other_data_is_not_overwritten(root, mini_coco, tmp_path):
    result = make(root, mini_coco, '--train', '5', '--val', '2', '--seed', '1')
    assert result.returncode != 0 and 'holds something else' in result.stderr
    (tmp_path / 'mine').mkdir()
    assert make(root, tmp_path / 'mine').returncode != 0


@pytest.mark.parametrize(
    'option, value', [('--train', '0'), ('--val', '-1'), ('--seed', '-1'), ('--test', '-1')]
)
def test_arguments_out_of_range_are_refused(root, tmp_path, option, value):
    result = make(root, tmp_path / 'x', option, value)
    assert result.returncode == 2 and f'{option} must be at least' in result.stderr
    assert f'got {value}' in result.stderr

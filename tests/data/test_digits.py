"""The demo's data, checked against scikit-learn's labels."""

import functools
from itertools import combinations

import numpy as np
import pytest
from sklearn.datasets import load_digits

from pilot_flwr.config.data import DataConfig
from pilot_flwr.data import demo
from pilot_flwr.data.demo import TASKS, Style, client_examples, client_sizes, render
from pilot_flwr.data.federation import client_examples as federation_examples
from pilot_flwr.data.federation import federation_clients
from pilot_flwr.errors import ConfigError

WORDS = "zero one two three four five six seven eight nine".split()
PLACES = ["top left", "top right", "bottom left", "bottom right"]


def examples(task="vqa", client_index=0, split="train", num_examples=20, seed=0, num_clients=9):
    return client_examples(
        task,
        client_index=client_index,
        num_clients=num_clients,
        split=split,
        num_examples=num_examples,
        seed=seed,
    )


def source_scans(example):
    return [int(scan) for scan in example.id.split("/")[-1].split("-")]


@functools.cache
def labels_of_all_scans():
    return load_digits().target


def source_labels(example):
    return [int(label) for label in labels_of_all_scans()[source_scans(example)]]


def recount(task, question, labels):
    """Answer from the labels alone, written independently of the package."""
    if task == "counting":
        return str(sum(label in (1, 3, 5, 7, 9) for label in labels))
    if task == "captioning":
        named = [WORDS[label] for label in labels]
        return f"the digits {named[0]}, {named[1]}, {named[2]} and {named[3]}"
    (place,) = [n for n, name in enumerate(PLACES) if name in question]
    return WORDS[labels[place]]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["train", "test", "validation"])
def test_answers_agree_with_the_source_labels(task, split):
    for example in examples(task, split=split, num_examples=60):
        user, assistant = example.turns
        assert (user.role, assistant.role) == ("user", "assistant")
        marker, question = user.text.split("\n")
        assert marker == "<image>"
        assert assistant.text == recount(task, question, source_labels(example))


@pytest.mark.parametrize("task", TASKS)
def test_images_are_small_rgb_and_ids_unique(task):
    drawn = examples(task, num_examples=40)
    assert {(e.images[0].read().mode, e.images[0].read().size) for e in drawn} == {
        ("RGB", (32, 32))
    }
    assert len({e.id for e in drawn}) == 40
    assert {len(set(source_scans(e))) for e in drawn} == {4}


def test_a_plain_mosaic_shows_its_scans_in_reading_order():
    scans = demo.load_scans()
    page = np.asarray(render(scans.ink[[3, 5, 8, 13]], Style(), np.random.default_rng(0)))
    for place, scan in enumerate([3, 5, 8, 13]):
        row, column = divmod(place, 2)
        tile = page[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
        for channel in range(3):
            np.testing.assert_allclose(tile[..., channel] / 255, scans.ink[scan], atol=1 / 255)


def test_enlarged_scans_keep_the_originals_mean_ink():
    original = load_digits().images.mean(axis=(1, 2)) / 16
    np.testing.assert_allclose(demo.load_scans().ink.mean(axis=(1, 2)), original, atol=0.02)


def same(one, other):
    return [(e.id, e.turns, e.images[0].read().tobytes()) for e in one] == [
        (e.id, e.turns, e.images[0].read().tobytes()) for e in other
    ]


def test_equal_arguments_give_equal_examples_and_fewer_are_a_prefix():
    assert same(examples(), examples())
    assert same(examples(num_examples=5), examples(num_examples=20)[:5])
    assert not same(examples(seed=0), examples(seed=1))
    assert not same(examples(split="train"), examples(split="test"))


def test_no_global_random_state_is_read_or_changed():
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    first = examples()
    assert (np.random.get_state()[1] == before).all()
    np.random.seed(2)
    assert same(first, examples())


def test_subsets_are_disjoint_cover_everything_and_hold_every_digit_in_proportion():
    labels = load_digits().target
    subsets = {name: demo.scan_indices(name) for name in demo.SPLIT_SHARES}
    together = np.concatenate(list(subsets.values()))
    assert sorted(together) == list(range(1797))
    for name, share in demo.SPLIT_SHARES.items():
        counts = np.bincount(labels[subsets[name]], minlength=10)
        assert np.abs(counts - share * np.bincount(labels)).max() <= 1


@pytest.mark.parametrize("num_clients", [1, 2, 9, 52])
def test_training_scans_are_dealt_out_without_overlap(num_clients):
    labels = load_digits().target
    shares = [
        set(demo.client_scan_indices(k, num_clients=num_clients).tolist())
        for k in range(num_clients)
    ]
    assert all(a.isdisjoint(b) for a, b in combinations(shares, 2))
    assert set.union(*shares) == set(demo.scan_indices("train").tolist())
    assert all({labels[scan] for scan in share} == set(range(10)) for share in shares)


def test_past_the_disjoint_limit_clients_take_the_shares_in_turn():
    limit = demo.max_disjoint_clients()
    assert limit == 52
    first, last = (demo.client_scan_indices(k, num_clients=limit + 1) for k in (0, limit))
    assert (first == last).all()


def test_examples_use_their_own_subset_only():
    for split in ("train", "test", "validation"):
        used = {scan for e in examples(split=split) for scan in source_scans(e)}
        assert used <= set(demo.scan_indices(split).tolist())
    own = set(demo.client_scan_indices(4, num_clients=9).tolist())
    used = {scan for e in examples(client_index=4) for scan in source_scans(e)}
    assert used <= own


def test_every_count_is_about_equally_frequent():
    drawn = examples("counting", num_examples=500)
    counts = np.bincount([int(e.answers[0]) for e in drawn], minlength=5)
    # Binomial(500, 1/5): mean 100, standard deviation 8.9; four of them allowed.
    assert len(counts) == 5 and np.abs(counts - 100).max() < 36


def test_styles_differ_by_client_and_depend_on_seed_and_index_alone():
    styles = [demo.client_style(k, seed=0) for k in range(9)]
    assert len(set(styles)) == 9
    assert {np.mean(s.ink) > np.mean(s.paper) for s in styles} == {True, False}
    assert demo.client_style(3, seed=0) == styles[3]
    assert demo.client_style(3, seed=1) != styles[3]


def test_one_page_looks_different_in_each_trait():
    tiles = demo.load_scans().ink[:4]
    traits = [
        Style(),
        Style(ink=(0, 0, 0), paper=(1, 1, 1)),
        Style(ink=(1, 0.5, 0.5)),
        Style(blur=0.8),
        Style(paper=(0.5, 0.5, 0.5), shading=0.5),
        Style(noise=0.1),
    ]
    pages = [render(tiles, style, np.random.default_rng(0)) for style in traits]
    assert len({page.tobytes() for page in pages}) == len(traits)


@pytest.mark.parametrize(("num_clients", "mean"), [(1, 200), (2, 10), (9, 200), (9, 1), (30, 7)])
def test_sizes_spread_around_the_mean(num_clients, mean):
    sizes = client_sizes(num_clients, mean)
    assert sizes == client_sizes(num_clients, mean)
    assert len(sizes) == num_clients and min(sizes) >= 1
    assert abs(np.mean(sizes) - mean) <= 0.5
    if mean >= 10 * num_clients > 10:
        assert len(set(sizes)) == num_clients


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"task": "ocr"},
            "`task` is 'ocr' but must be one of vqa, counting, captioning.",
        ),
        ({"split": "dev"}, "`split` is 'dev' but must be one of train, test, validation."),
        ({"num_examples": 0}, "`num_examples` is 0 but must be at least 1."),
        ({"client_index": 9}, "`client_index` is 9 but must be 0 to 8."),
        ({"client_index": -1}, "`client_index` is -1 but must be at least 0."),
        ({"num_clients": 0}, "`num_clients` is 0 but must be at least 1."),
        ({"seed": -1}, "`seed` is -1 but must be at least 0."),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ConfigError) as error:
        examples(**change)
    assert str(error.value) == message


def test_bad_sizes_are_named():
    with pytest.raises(ConfigError, match="`mean` is 0 but must be at least 1"):
        client_sizes(3, 0)


def test_a_slant_shears_a_digit_about_its_centre():
    line = np.zeros((4, 16, 16), np.float32)
    line[:, :, 7:9] = 1
    page = np.asarray(render(line, Style(slant=0.25), np.random.default_rng(0)))
    ink = page[:16, :16, 0].astype(float)
    columns = ink @ (np.arange(16) + 0.5) / ink.sum(axis=1)
    np.testing.assert_allclose(columns, 8 - 0.25 * (np.arange(16) + 0.5 - 8), atol=0.02)


def test_a_run_evaluates_on_the_split_that_it_names():
    scans = {name: set(demo.scan_indices(name).tolist()) for name in ("test", "validation")}
    for name, allowed in scans.items():
        data = DataConfig(evaluate_on=name, test_examples=30)
        client = federation_clients(data)[1]
        read = federation_examples(data, client, "test", seed=0)
        assert {scan for example in read for scan in source_scans(example)} <= allowed

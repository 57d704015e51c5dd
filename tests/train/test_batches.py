"""What the stages read: placing, gathering, and that a batch follows from (seed, step) alone."""

import pytest
import torch
from diff2to3.data._augment import hue_matrix, mirror_coords, yaw_coords
from diff2to3.train._batches import ConditionBatches, OccupancyBatches, PictureBatches, ViewBatches, place
from diff2to3.train._data import Ragged, open_data
from hypothesis import given
from hypothesis import strategies as st
from sparse_vae import SparseTensor

GRID = 16


ALL = ("render", "voxels", "features", "latents")
KINDS = ["pictures", "occupancy", "views", "conditions", "structure conditions"]


def _data(config, stages=ALL):
    return open_data(config, "train", stages, torch.device("cpu"))


def _batches(config, kind):
    return {
        "pictures": lambda: PictureBatches(_data(config, ("render",))),
        "occupancy": lambda: OccupancyBatches(_data(config, ("voxels",)), GRID),
        "views": lambda: ViewBatches(_data(config), GRID),
        "conditions": lambda: ConditionBatches(_data(config), GRID, "view-snapped", with_latents=True),
        "structure conditions": lambda: ConditionBatches(_data(config), GRID, "canonical", with_voxels=True),
    }[kind]()


def _assert_same(one, two):
    assert one.keys() == two.keys()
    for key in one:
        for left, right in zip(_values(one[key]), _values(two[key]), strict=True):
            assert torch.equal(torch.as_tensor(left), torch.as_tensor(right)), key
            assert torch.as_tensor(left).dtype == torch.as_tensor(right).dtype, key


def _values(entry):
    return (entry.features, entry.topology.coords) if isinstance(entry, SparseTensor) else (entry,)


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 1), st.integers(0, 3)), min_size=1, max_size=4))
def test_place_is_mirror_then_quarter_turns_of_each_object(objects):
    generator = torch.Generator().manual_seed(0)
    coords = [torch.randint(GRID, (count, 3), generator=generator) for count, _, _ in objects]
    batch = torch.arange(len(objects)).repeat_interleave(torch.tensor([len(c) for c in coords]))
    mirror, turn = (torch.tensor([o[k] for o in objects]) for k in (1, 2))
    placed = place(torch.cat(coords), batch, mirror, turn, GRID)
    for index, (own, (_, mirrored, turns)) in enumerate(zip(coords, objects, strict=True)):
        expected = yaw_coords(mirror_coords(own, GRID) if mirrored else own, turns, GRID)
        assert torch.equal(placed[batch == index, 1:].long(), expected)


def test_ragged_selection_returns_the_rows_of_the_chosen_objects():
    parts = [torch.full((n, 2), float(n)) for n in (3, 1, 4)]
    ragged = Ragged(parts, torch.device("cpu"))
    batch, rows = ragged.select(torch.tensor([2, 0, 2]))
    assert torch.equal(batch, torch.tensor([0] * 4 + [1] * 3 + [2] * 4))
    assert torch.equal(ragged.rows[rows], torch.cat([parts[2], parts[0], parts[2]]))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_a_function_of_seed_and_step(micro_config, kind, streaming):
    first, again, other = (_batches(micro_config("flow", seed=s, streaming=streaming), kind) for s in (0, 0, 1))
    first[0], first[1]  # earlier batches leave no trace
    _assert_same(first[5], again[5])
    assert first[4]["seed"] != first[5]["seed"] != other[5]["seed"]


@pytest.mark.parametrize("kind", KINDS)
def test_folder_and_shards_held_and_streamed_give_the_same_batches(micro_config, folder_data, shard_data, kind):
    sources = [(folder_data, False), (folder_data, True), (shard_data, False), (shard_data, None)]
    held, *others = (_batches(micro_config("flow", data=d, streaming=s, batch_size=3), kind) for d, s in sources)
    for step in (0, 1, 6):
        for other in others:
            _assert_same(held[step], other[step])


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_object_is_seen_once_a_pass(micro_config, shard_data, ranks):
    """Process r of R makes the items r, r + R, ...; however many there are, no object is lost or comes twice."""
    data = _data(micro_config("flow", data=shard_data, batch_size=1))
    items = sorted(step * ranks + rank for rank in range(ranks) for step in range(42 // ranks))
    seen = [int(data.draw(item)[0]) for item in items]
    passes = [seen[k : k + 7] for k in range(0, 42, 7)]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert len({tuple(one) for one in passes}) > 3


def test_objects_are_in_the_order_of_the_shards_and_limited(micro_config, folder_data, shard_data):
    """`max_objects` takes the same ones of a folder and of its shards."""
    folder, shards = (
        _data(micro_config("flow", data=d, max_objects=3, streaming=True)) for d in (folder_data, shard_data)
    )
    assert len(folder) == len(shards) == 3
    for number in range(3):
        one, two = (d.objects.file(number, "voxels").read("coords") for d in (folder, shards))
        assert (one == two).all()


def test_view_snapped_conditions_come_from_within_45_degrees_of_the_front(micro_config):
    """Turned with its object, every camera stands within 45 degrees of the front; the voxels are turned as it says."""
    data = _data(micro_config("flow", batch_size=2))
    batches = ConditionBatches(data, GRID, "view-snapped", with_latents=True)
    canonical = ConditionBatches(data, GRID, "canonical", with_latents=True)
    every = torch.arange(data.num_pictures("condition"))
    turned = 0
    for step in range(8):
        snapped, plain = batches[step], canonical[step]
        assert torch.equal(snapped["condition"], plain["condition"])
        for index in range(2):
            own, base = (b["latents"].topology.coords for b in (snapped, plain))
            own, base = ({*map(tuple, c[c[:, 0] == index][:, 1:].tolist())} for c in (own, base))
            turn = int(snapped["turn"][index])
            assert {*map(tuple, yaw_coords(torch.tensor([*base]), turn, GRID).tolist())} == own
            turned += turn != 0
            chosen, mirror = int(snapped["object"][index]), bool(snapped["mirror"][index])
            same = torch.full_like(every, chosen)
            pictures, azimuths = data.pictures("condition", same, every), data.table("condition_azimuth", same, every)
            pictures = pictures.flip(-1) if mirror else pictures
            [view] = [v for v, picture in enumerate(pictures) if torch.equal(picture, snapped["condition"][index, 0])]
            azimuth = float(azimuths[view]) * (-1 if mirror else 1) + 90 * turn
            assert abs((azimuth + 180) % 360 - 180) <= 45
    assert turned


def test_targets_carry_the_hue_of_their_features(micro_config):
    batch = ViewBatches(_data(micro_config("vae")), GRID)[0]
    assert set(batch["hue"].tolist()) <= {0.0, 120.0}
    matrix = hue_matrix(torch.tensor([120.0]))[0]
    assert torch.allclose(matrix @ torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0]), atol=1e-6)


def test_an_empty_split_is_a_lookup_error(micro_config):
    with pytest.raises(LookupError, match="split 'test' has no object"):
        open_data(micro_config("vae"), "test", ("render",), torch.device("cpu"))

"""Safetensors files read in parts, wherever they lie, and what is said of damaged ones."""

import json

import numpy as np
import pytest
from diff2to3.data._store import Store
from diff2to3.data._tensor_file import DamagedFileError, TensorFile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save

ARRAYS = st.dictionaries(
    st.sampled_from(["a", "b", "longer name"]),
    st.sampled_from([np.float16, np.float32, np.uint8, np.int64]).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    ),
    min_size=1,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("files") / "some.tar"


@given(ARRAYS, st.integers(0, 700), st.data())
def test_parts_are_what_the_library_wrote(place, arrays, start, data):
    payload = save(arrays)
    place.write_bytes(b"x" * start + payload + b"yyy")
    file = TensorFile(place, start, len(payload))
    file.verify()
    for key, array in arrays.items():
        assert file.shape(key) == array.shape
        np.testing.assert_array_equal(file.read(key), array)
        assert file.read(key).dtype == array.dtype
        if 0 in array.shape or not array.shape:
            continue
        depth = data.draw(st.integers(1, array.ndim))
        index = tuple(data.draw(st.integers(0, n - 1)) for n in array.shape[:depth])
        np.testing.assert_array_equal(file.read(key, *index), array[index])
        first, last = sorted(data.draw(st.integers(0, array.shape[0])) for _ in range(2))
        np.testing.assert_array_equal(file.read_rows(key, first, last), array[first:last])


@given(st.binary(max_size=80), st.data())
def test_any_bytes_are_read_or_refused(place, garbage, data):
    """Every change of a header's bytes gives an array or the one error, never another."""
    payload = bytearray(save({"a": np.arange(6, dtype=np.float32).reshape(2, 3)}))
    for position, value in enumerate(garbage):
        payload[data.draw(st.integers(0, len(payload) - 1))] = value
        if position > 3:
            break
    for content in (bytes(payload), garbage):
        place.write_bytes(content)
        file = TensorFile.whole(place)
        for work in (lambda f: f.read("a"), lambda f: f.read("a", 1), lambda f: f.read_rows("a", 0, 1)):
            try:
                work(file)
            except DamagedFileError:
                continue


def test_damage_is_named(tmp_path):
    store = Store(tmp_path)
    store.write("s", "o", {"a": np.arange(12).reshape(3, 4)}, {})
    path = store.path("s", "o")
    whole = path.read_bytes()

    def message(work, payload=whole, start=0):
        path.write_bytes(payload)
        with pytest.raises(DamagedFileError, match=r"o\.safetensors") as caught:
            work(TensorFile(path, start, len(whole)))
        return str(caught.value)

    assert "no usable tensor 'b'" in message(lambda f: f.read("b"))
    assert "a has shape [3, 4] and nothing at [3]" in message(lambda f: f.read("a", 3))
    assert "no rows 2 to 4" in message(lambda f: f.read_rows("a", 2, 4))
    assert "the file was cut off" in message(lambda f: f.read("a"), whole[:-1])
    assert "its header is no JSON" in message(lambda f: f.read("a"), whole[:8] + b"!" + whole[9:])
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    assert "another SHA-256" in message(lambda f: f.verify(), flipped)
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    header["a"]["data_offsets"] = [0, 1 << 40]
    text = json.dumps(header).encode()
    changed = len(text).to_bytes(8, "little") + text + whole[8 + length :]
    assert "contradicts itself about 'a'" in message(lambda f: f.read("a"), changed)
    assert "ends at byte" in message(lambda f: f.read("a"), (1 << 40).to_bytes(8, "little") + whole[8:])
    assert "the file at byte 7" in message(lambda f: f.read("a"), b"x" * 7 + whole[:-8] + b"\0", 7)
    with pytest.raises(DamagedFileError, match="No such file"):
        TensorFile.whole(tmp_path / "none")

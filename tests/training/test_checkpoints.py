"""Checkpoints: bit for bit on any mesh, intact after a kill, and damaged ones skipped."""

import contextlib
import itertools
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from befm_jax import checksums
from befm_jax.training.checkpoint import CheckpointError, CheckpointMismatchError, Checkpoints
from tests.helpers.checkpoint_states import abstract, check, mesh_of, state

ONE = (1, 1, 1)


def folders(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Checkpoints of steps 1 to 3, never to be changed."""
    directory = tmp_path_factory.mktemp("three")
    saved = Checkpoints(directory, keep=3)
    for step in (1, 2, 3):
        saved.save(step, state(step, mesh_of(*ONE)), loss=float(step))
    saved.close()
    return directory


@pytest.fixture
def copied(three, tmp_path):
    shutil.copytree(three, tmp_path / "run")
    return tmp_path / "run"


def test_a_state_is_the_same_bits_on_every_mesh_that_it_is_read_into(tmp_path):
    meshes = [(2, 2, 2), ONE, (1, 8, 1), (1, 1, 2)]
    for step, (shape, next_shape) in enumerate(itertools.pairwise(meshes), start=1):
        saved = Checkpoints(tmp_path, keep=5)
        saved.save(step, state(step, mesh_of(*shape)))
        saved.close()
        again = Checkpoints(tmp_path, keep=5)
        check(again.restore(abstract(mesh_of(*next_shape))), step, mesh_of(*next_shape))
        again.close()


def test_shapes_without_devices_are_read_onto_the_first(three):
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), abstract(mesh_of(*ONE))
    )
    found = Checkpoints(three, keep=3).restore(like)
    assert {device for leaf in jax.tree.leaves(found) for device in leaf.devices()} == {
        jax.devices()[0]
    }
    check(found, 3, mesh_of(*ONE))


def test_without_any_checkpoint_there_is_nothing_to_restore(tmp_path):
    saved = Checkpoints(tmp_path / "new", keep=1)
    assert saved.last is None
    assert saved.restore(abstract(mesh_of(*ONE))) is None
    assert saved.restore_best(abstract(mesh_of(*ONE)).trained) is None
    saved.close()


@pytest.mark.parametrize("shape", [ONE, (2, 2, 2)])
def test_what_is_saved_may_be_overwritten_at_once(tmp_path, shape):
    """The step is compiled ahead and donates its state, as training does."""
    mesh = mesh_of(*shape)
    held = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    drawn = np.random.default_rng(0).standard_normal((4096, 2048), dtype=np.float32)
    large = state(1, mesh).replace(trained={"w": jax.device_put(drawn, held)})

    def overwrite(now):
        return now.replace(
            step=now.step + 1, trained=jax.tree.map(lambda leaf: leaf * 0 - 1, now.trained)
        )

    step = jax.jit(overwrite, donate_argnums=0).lower(large).compile()
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), large
    )
    first = int(large.step)
    saved = Checkpoints(tmp_path, keep=1)
    saved.save(1, large)
    for _ in range(8):
        large = step(large)
    jax.block_until_ready(large)
    saved.close()
    found = Checkpoints(tmp_path, keep=1).restore(like)
    assert int(found.step) == first
    np.testing.assert_array_equal(found.trained["w"], drawn)


def test_the_last_and_the_best_are_kept(tmp_path):
    mesh = mesh_of(*ONE)
    saved = Checkpoints(tmp_path, keep=2, best=True)
    # The earliest of equals is the best; NaN and none never are.
    losses = {1: 3.0, 2: None, 3: 1.0, 4: 1.0, 5: float("nan"), 6: 2.0, 7: 1.5}
    for step, loss in losses.items():
        saved.save(step, state(step, mesh), loss)
    saved.close()
    assert folders(tmp_path) == ["3", "6", "7"]
    again = Checkpoints(tmp_path, keep=2, best=True)
    assert again.last == 7
    step, trained = again.restore_best(abstract(mesh).trained)
    assert step == 3
    check(state(3, mesh).replace(trained=trained), 3, mesh)
    again.save(8, state(8, mesh), 0.5)
    again.close()
    assert folders(tmp_path) == ["7", "8"]


def test_without_best_only_the_last_are_kept(tmp_path):
    saved = Checkpoints(tmp_path, keep=1)
    for step in (1, 2, 3):
        saved.save(step, state(step, mesh_of(*ONE)), loss=float(step))
    saved.close()
    assert folders(tmp_path) == ["3"]
    assert saved.last == 3


def test_a_damaged_best_is_named_and_the_next_best_taken(copied, capsys):
    damaged = copied / "1"
    largest = max(damaged.rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    changed = bytearray(largest.read_bytes())
    changed[len(changed) // 2] ^= 1  # the size stays: only its sum tells
    largest.write_bytes(changed)
    saved = Checkpoints(copied, keep=3, best=True)
    assert saved.restore_best(abstract(mesh_of(*ONE)).trained)[0] == 2
    assert f"warning: {damaged}: this checkpoint is damaged" in capsys.readouterr().err
    assert folders(copied) == ["1.damaged", "2", "3"]


def test_every_file_cut_off_anywhere_has_the_one_before_taken(three, tmp_path, capsys):
    randomness = random.Random(0)
    files = [path.relative_to(three / "3") for path in (three / "3").rglob("*") if path.is_file()]
    assert len(files) > 8
    for number, name in enumerate(files * 3):
        run = tmp_path / str(number)
        shutil.copytree(three, run)
        path = run / "3" / name
        path.write_bytes(path.read_bytes()[: randomness.randrange(path.stat().st_size)])
        saved = Checkpoints(run, keep=3)
        assert saved.last == 2, name
        assert f"{run / '3'}: this checkpoint is damaged ({name} " in capsys.readouterr().err
        if number % 10 == 0:
            check(saved.restore(abstract(mesh_of(*ONE))), 2, mesh_of(*ONE))


@pytest.mark.parametrize("harm", ["flip", "delete", "empty folder"])
def test_other_damage_is_passed_over_too(three, tmp_path, capsys, harm):
    names = sorted(
        path.relative_to(three / "3") for path in (three / "3").rglob("*") if path.is_file()
    )
    for number, name in enumerate(names):
        run = tmp_path / str(number)
        shutil.copytree(three, run)
        path = run / "3" / name
        if harm == "flip":
            changed = bytearray(path.read_bytes())
            changed[number * 7 % len(changed)] ^= 1 << number % 8
            path.write_bytes(changed)
        elif harm == "delete":
            path.unlink()
        else:
            shutil.rmtree(run / "3")
            (run / "3").mkdir()
        assert Checkpoints(run, keep=3).last == 2, name
        assert f"{run / '3'}: this checkpoint is damaged" in capsys.readouterr().err


def test_all_damaged_is_no_checkpoint(copied, capsys):
    for step in "123":
        (copied / step / checksums.FILE).unlink()
    assert Checkpoints(copied, keep=3).last is None
    assert capsys.readouterr().err.count(f"{checksums.FILE} is missing") == 3


def test_a_step_that_was_damaged_is_saved_again(copied, capsys):
    (copied / "3" / "manifest.ocdbt").write_bytes(b"")
    (copied / "3.damaged").mkdir()  # of an earlier time
    saved = Checkpoints(copied, keep=3)
    saved.save(3, state(3, mesh_of(*ONE)))
    saved.close()
    assert folders(copied) == ["1", "2", "3", "3.damaged"]
    assert (copied / "3.damaged" / "manifest.ocdbt").is_file()
    again = Checkpoints(copied, keep=3)
    check(again.restore(abstract(mesh_of(*ONE))), 3, mesh_of(*ONE))


def test_what_was_half_written_or_half_deleted_is_cleared_away(copied, capsys):
    shutil.copytree(copied / "3", copied / "4.orbax-checkpoint-tmp")
    (copied / "4.orbax-checkpoint-tmp" / checksums.FILE).unlink()
    (copied / "1").rename(copied / "1.deleted")
    assert Checkpoints(copied, keep=3).last == 3
    told = capsys.readouterr().err
    assert f"{copied / '4.orbax-checkpoint-tmp'}: this checkpoint is half-written" in told
    assert told.count("warning") == 1
    assert folders(copied) == ["2", "3"]


def test_another_shape_or_dtype_is_named_and_is_no_damage(copied, capsys):
    like = abstract(mesh_of(*ONE))
    linear = dict(like.trained["layers/self_attn/q_proj"])
    saved = Checkpoints(copied, keep=3)

    def with_a(shape, dtype):
        a = jax.ShapeDtypeStruct(shape, dtype, sharding=linear["a"].sharding)
        return like.replace(trained=like.trained | {"layers/self_attn/q_proj": linear | {"a": a}})

    name = "trained/layers/self_attn/q_proj/a"
    for wrong, told in [
        (
            with_a((3, 4, 24), jnp.float32),
            rf"{name} is float32\[3,8,24\] there and float32\[3,4,24\]",
        ),
        (with_a((3, 8, 24), jnp.bfloat16), rf"{name} is float32\[3,8,24\] there and bfloat16"),
        (
            like.replace(trained={}),
            r"trained/.*/a is float32\[3,8,24\] there and absent in this run",
        ),
        (
            like.replace(moments=(*like.moments, like.step)),
            r"moments/2 is absent there and int32\[\]",
        ),
        (
            like.replace(key=jax.eval_shape(lambda: jax.random.key(0, impl="rbg"))),
            r"key is key<fry>\[\] there and key<rbg>",
        ),
    ]:
        with pytest.raises(CheckpointMismatchError, match=rf"/3: {told}"):
            saved.restore(wrong)
    with pytest.raises(
        CheckpointMismatchError, match=rf"/1: {name} is float32\[3,8,24\] there and"
    ):
        saved.restore_best(with_a((1, 8, 24), jnp.float32).trained)
    with pytest.raises(CheckpointMismatchError, match=r"/1: .* there and absent in this run"):
        saved.restore_best({"norm": like.trained["norm"]})
    assert folders(copied) == ["1", "2", "3"]
    assert "damaged" not in capsys.readouterr().err


def test_a_key_of_another_generator_comes_back_as_such(tmp_path):
    key = jax.random.key(7, impl="rbg")
    started = state(1, mesh_of(*ONE)).replace(key=key)
    saved = Checkpoints(tmp_path, keep=1)
    saved.save(1, started)
    saved.close()
    found = Checkpoints(tmp_path, keep=1).restore(jax.eval_shape(lambda: started))
    assert jax.random.key_impl(found.key) == "rbg"
    np.testing.assert_array_equal(jax.random.bits(found.key, (4,)), jax.random.bits(key, (4,)))


def test_a_folder_that_cannot_be_made_is_an_error_that_names_it(tmp_path):
    saved = Checkpoints(tmp_path / "run", keep=1)
    (tmp_path / "run").rmdir()
    (tmp_path / "run").write_text("no folder")
    with pytest.raises(CheckpointError, match=r"run/1: the checkpoint can't be written \(.+: .+\)"):
        saved.save(1, state(1, mesh_of(*ONE)))
    saved.close()


def test_a_disk_that_is_full_is_an_error_that_names_the_folder(copied, capsys):
    saved = Checkpoints(copied, keep=2)
    large = state(4, mesh_of(*ONE)).replace(trained={"w": jnp.ones((1024, 1024))})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))  # no file may have more bytes
    try:
        saved.save(4, large)
        with pytest.raises(CheckpointError, match=r"/4: the checkpoint can't be written"):
            saved.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    # Orbax gives up at the first error, and leaves other writes of this process under way.
    for _ in range(60):
        with contextlib.suppress(OSError):
            again = Checkpoints(copied, keep=2)
            break
        time.sleep(0.5)
    assert again.last == 3
    assert folders(copied) == ["1", "2", "3"]
    assert "4.orbax-checkpoint-tmp: this checkpoint is half-written" in capsys.readouterr().err


SAVING = """
import itertools, sys
from pathlib import Path
from tests.helpers.checkpoint_states import abstract, mesh_of, state
from befm_jax.training.checkpoint import Checkpoints

mesh = mesh_of(1, 1, 1)
saved = Checkpoints(Path(sys.argv[1]), keep=2)
saved.restore(abstract(mesh))
print("going on from", saved.last, flush=True)
for step in itertools.count((saved.last or 0) + 1):
    saved.save(step, state(step, mesh))
"""

# What is seen in the folder at the moment of the kill.
MOMENTS = [
    "*.orbax-checkpoint-tmp",
    "*.orbax-checkpoint-tmp/ocdbt.process_0/d/*",
    "*.orbax-checkpoint-tmp/manifest.ocdbt",
    f"*.orbax-checkpoint-tmp/{checksums.FILE}",
    "*.deleted",
    "*",
]


def test_a_kill_while_saving_leaves_a_whole_one(tmp_path, capsys):
    run, last = tmp_path / "run", None
    run.mkdir()
    for moment in MOMENTS:
        process = subprocess.Popen(
            [sys.executable, "-c", SAVING, str(run)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=Path(__file__).resolve().parents[2],
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"going on from {last}\n"
            until = (last or 0) + 4  # a few are whole, and older ones went
            while not (run / str(until)).exists():
                assert process.poll() is None
                time.sleep(0.005)
            while not any(run.glob(moment)):
                assert process.poll() is None
        finally:
            process.kill()
            process.communicate()
        shutil.copytree(run, tmp_path / "seen")
        saved = Checkpoints(tmp_path / "seen", keep=2)
        assert saved.last is not None
        assert saved.last >= until, moment
        check(saved.restore(abstract(mesh_of(*ONE))), saved.last, mesh_of(*ONE))
        assert "damaged" not in capsys.readouterr().err, moment  # half-written at most
        last = saved.last
        shutil.rmtree(tmp_path / "seen")


READING = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from befm_jax.training.checkpoint import Checkpoints
from befm_jax.training.step import State

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

shape = jax.ShapeDtypeStruct
trained = {str(i): shape((2, 1024, 1024), jnp.float32) for i in range(64)}
like = State(shape((), jnp.int32), trained, (), shape((), jax.random.key(0).dtype))
if sys.argv[2] == "save":
    saved = Checkpoints(Path(sys.argv[1]), keep=1)
    filled = {name: jnp.full(leaf.shape, 1.5, leaf.dtype) for name, leaf in trained.items()}
    saved.save(1, State(jnp.int32(1), filled, (), jax.random.key(0)))
    saved.close()
else:
    small = State(jnp.int32(0), {"0": jnp.ones(4)}, (), jax.random.key(0))
    warm = Checkpoints(Path(sys.argv[1]) / "small", keep=1)
    warm.save(1, small)
    jax.block_until_ready(warm.restore(jax.eval_shape(lambda: small)))  # loads what reading takes
    saved = Checkpoints(Path(sys.argv[1]), keep=1)
    before = peak()
    jax.block_until_ready(saved.restore(like))
    print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_memory_peaks_at_about_one_copy(tmp_path):
    """512 MB of state; a second copy would show, what a few reads under way hold may."""

    def child(what):
        environment = {**os.environ, "XLA_FLAGS": ""}
        command = [sys.executable, "-c", READING, str(tmp_path / "run"), what]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, env=environment
        ).stdout

    child("save")
    assert 512 <= float(child("read")) < 1.5 * 512

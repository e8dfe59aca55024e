"""Eight virtual CPU devices and one compilation cache for the whole suite."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The scheduler that XLA has by default on CPU starts collectives of one program in another order on
# each virtual device.  Where cores are few and busy, devices then wait for each other until XLA
# aborts the process (seen with int8 bases over meshes of fsdp and tensor, jaxlib 0.10.2).
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    " --xla_cpu_enable_concurrency_optimized_scheduler=false"
)
# Threads of XLA's pool: a collective of a virtual device waits for the others in one of them, and
# several can wait at a time; with as many threads as two cores give, meshes of two axes then wait
# for ever for one that has none left to run in.
os.environ.setdefault("NPROC", "32")
# The suite compiles thousands of small programs that run once: quickly compiled is what counts.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Nothing in the suite may reach for a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import jax
import pytest

# The same examples every time, and no clock: a busy machine must not turn a test red.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steady")

jax.config.update(
    "jax_compilation_cache_dir",
    os.environ.get(
        "BEFM_TEST_CACHE", str(Path(tempfile.gettempdir()) / f"befm_jax_test_cache_{os.getuid()}")
    ),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    """How often `test_survival.py` kills a run."""
    parser.addoption("--kills", type=int, default=2, help="kills of a run (default: 2)")


# Whole files of tests that start processes, train, or compile much.
SLOW = {
    "adapters/test_export.py",
    "adapters/test_lora.py",
    "adapters/test_peft.py",
    "distributed/test_mesh.py",
    "distributed/test_processes.py",
    "inference/test_checks.py",
    "inference/test_kv_cache.py",
    "inference/test_meshes.py",
    "inference/test_processes.py",
    "inference/test_sample.py",
    "inference/test_score.py",
    "launch/test_local_pod.py",
    "launch/test_tpu_pod.py",
    "llama/test_attention.py",
    "llama/test_attention_gpu.py",
    "llama/test_attention_tpu.py",
    "llama/test_log_probs.py",
    "llama/test_parity.py",
    "planning/test_programs.py",
    "respondents/test_engine.py",
    "respondents/test_reading.py",
    "serving/test_lm_harness.py",
    "test_damaged_models.py",
    "test_entry_points.py",
    "test_plan.py",
    "test_quickstart.py",
    "test_survival.py",
    "test_train.py",
    "test_training_processes.py",
    "tools/test_benches.py",
    "tools/test_int8_quality.py",
    "training/test_ahead.py",
    "training/test_checkpoint_processes.py",
    "training/test_checkpoints.py",
    "training/test_step.py",
}
# Of these files, one test for each promise is quick all the same.
QUICK = {
    "test_a_short_answer_costs_few_steps_and_programs",
    "test_accumulation_does_not_change_loss_or_gradient",
    "test_log_probs_equal_transformers_one_sequence_at_a_time",
    "test_this_comparison_sees_a_wrong_constant",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is slow: `pytest -m "not slow"` leaves it out."""
    here = Path(__file__).parent
    for item in items:
        name = item.name.split("[")[0]
        if item.path.relative_to(here).as_posix() in SLOW and name not in QUICK:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """No file's programs stay in memory: together they take 5 GB, and time at every collection."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def moblab_csv() -> Path:
    """The real table of MobLab choices; the test is skipped where it is not at hand."""
    path = SHARED / "moblab" / "joint.csv"
    if not path.exists():
        pytest.skip("needs the MobLab table at ../shared/data/moblab/joint.csv, absent here")
    return path

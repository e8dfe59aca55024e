"""Every benchmark runs at a tiny size, and finds both sides equal.  No speed is asserted."""

import importlib
import json
import math
import re
from contextlib import contextmanager
from types import SimpleNamespace

import bench
import bench_data
import bench_limits
import bench_models
import bench_peers
import bench_pipeline
import bench_processes
import bench_sides
import bench_train
import jax
import numpy as np
import pytest

from befm_jax import config as befm_config
from befm_jax.adapters import peft
from befm_jax.data import forest as forests
from befm_jax.errors import UserError
from befm_jax.llama.model import shapes

pytest.importorskip("torch")
from tests.helpers.small import asked


@pytest.fixture
def in_one_process(monkeypatch):
    """The sides themselves without a process around each: libraries are imported once."""

    @contextmanager
    def started(side, device):
        module, _, name = side.name.partition(".")
        made = getattr(importlib.import_module(module), name)(**json.loads(json.dumps(side.given)))
        yield SimpleNamespace(ask=lambda what: json.loads(json.dumps(getattr(made, what)())))

    monkeypatch.setattr(bench_sides, "_started", started)
    # PyTorch's threads spin while they wait, which is slow where others work too.
    monkeypatch.setattr(bench_peers.os, "cpu_count", lambda: 1)


def found(*words):
    """The benchmark of a command line."""
    arguments = bench.parser().parse_args(list(map(str, words)))
    return arguments.run(arguments)


def goals(one):
    return {goal.name: goal for goal in one.goals}


def check(one, sides, rounds):
    """Both sides are there run by run, with a ratio, in the table and in the file."""
    for side in sides:
        assert len(one.runs[side]) == rounds
        assert all(run["seconds"] > 0 for run in one.runs[side] if "seconds" in run)
    assert all(each.min <= each.median <= each.max for each in one.ratio.values())
    assert json.loads(json.dumps(one.as_dict()))["ratio"].keys() == one.ratio.keys()
    assert f"{sides[-1]} {rounds}" in one.table()


def test_training_begins_with_equal_gradients(questionnaires, in_one_process, monkeypatch):
    monkeypatch.setitem(bench_train.OURS, "cpu", [bench_train.Setting(1, False, False)])
    one = found(
        *("train", "--data", "bigfive", "--sample", 3, "--rounds", 2, "--seconds", 0.01),
        *("--shared", questionnaires, "--peer-batches", 4, 8),
    )
    check(one, ["ours", "peer"], 2)
    for what in ("gradients", "loss"):
        assert goals(one)[f"relative difference of the {what}"].figure < 1e-5
    assert {run["observations"] % 149 for run in one.runs["ours"]} == {0}
    assert any("149 answers of 3 of 3 respondents" in note for note in one.notes)


def test_steps_of_a_config_train_a_checkpoint(
    questionnaires, tmp_path, in_one_process, monkeypatch
):
    at = bench_models.Where("cpu", "tiny", "float32")
    bench_models.make(tmp_path / "model", at, ["The statement: I am the life of the party.", "[3]"])
    config = tmp_path / "config.py"
    config.write_text(
        "from befm_jax.config import Config, Data, Model\n"
        "def get_config():\n"
        "    return Config(model=Model(remat=True), data=Data(slots=900, rows_per_step=2))\n"
    )
    one = found(
        *("train", "--data", "bigfive", "--sample", 3, "--rounds", 1, "--seconds", 0.01),
        *("--shared", questionnaires, "--peer-batches", 4),
        *("--config", config, "--model", tmp_path / "model"),
    )
    check(one, ["ours", "peer"], 1)
    assert (one.settings["slots a row"], one.settings["rows a step"]) == (900, 2)
    assert goals(one)["relative difference of the gradients"].figure < 1e-5
    assert one.runs["ours"][0]["observations"] in (49, 50, 99, 100)
    (ours,) = (note for note in one.notes if note.startswith("ours: "))
    assert "2 steps take 149 observations" in ours


def test_packed_rows_train_in_bfloat16_at_the_best_setting(in_one_process, monkeypatch):
    # Of several settings: as on a GPU, and over the devices of a CPU.
    tried = [bench_train.Setting(1, False, True), bench_train.Setting(2, True, False)]
    monkeypatch.setitem(bench_train.OURS, "cpu", tried)
    monkeypatch.setitem(bench_train.CHECKPOINTING, "cpu", [True, False])
    one = found(
        *("train", "--data", "packed", "--dtype", "bfloat16", "--sample", 4, "--slots", 48),
        *("--rounds", 1, "--seconds", 0.01, "--peer-batches", 2),
    )
    check(one, ["ours", "peer"], 1)
    # A row's last token has no slot here.
    for side, tokens in (("ours", 47), ("peer", 48)):
        assert {run["tokens"] / run["observations"] for run in one.runs[side]} == {tokens}
    assert any("differ by" in note for note in one.notes)
    (ours,) = (note for note in one.notes if note.startswith("ours: "))
    for setting in (
        "1 row at once, a device for every core",
        "2 rows at once, layers computed again",
    ):
        assert re.search(rf"{setting}: [\d,.]+ observations a second, compiled in ", ours)
    assert any("(2, True): " in note and "(2, False): " in note for note in one.notes)


def test_exact_distributions_are_those_of_transformers():
    one = found(
        *("score", "--rounds", 1, "--answers", 4, "--seconds", 0),
        *("--peer-answers", 2, "--peer-batches", 2),
    )
    check(one, ["ours", "peer"], 1)
    assert goals(one)["difference of log-probabilities"].figure < 1e-4
    assert one.runs["ours"][0]["answers"] == sum(
        len(game.values) for game in bench_data.seven_games()
    )
    peer = one.runs["peer"][0]
    assert peer["whole"] == pytest.approx(2 * peer["seconds"])


def test_a_population_decodes_as_transformers_does(in_one_process):
    one = found(
        *("sample", "--rounds", 1, "--participants", 6, "--peer-participants", 3, "--prompt", 20),
        *("--new-tokens", 5, "--quantize", "int8", "--peer-batches", 3),
    )
    check(one, ["ours", "ours int8", "peer"], 1)
    equal = goals(one)["greedy tokens equal to the peer's"]
    assert equal.figure == equal.bound == 5
    assert "int8 against ours as stored, step" in one.ratio


@pytest.fixture
def as_on_a_gpu(in_one_process, monkeypatch):
    """`--device gpu` with its own settings and goals, 8B's code at the tiny shape, on this CPU."""
    monkeypatch.setattr(
        bench_models, "where", lambda _: bench_models.Where("gpu", "8b", "bfloat16")
    )
    for table in (bench_models.SHAPES, bench_models.PIECES):
        monkeypatch.setitem(table, "8b", table["tiny"])
    monkeypatch.setitem(bench_peers.TORCH, "gpu", "cpu")
    monkeypatch.setattr(bench_peers.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setitem(bench_limits._SIDES, "gpu", 64)
    monkeypatch.setitem(bench_limits._BYTES, "gpu", 1 << 20)


@pytest.mark.parametrize(
    ("words", "sides", "named"),
    [
        (
            ["train", "--sample", 4, "--slots", 48, "--seconds", 0.01, "--peer-batches", 2],
            ["ours", "peer"],
            {"against the peer", "of the matrix-product peak"},
        ),
        (
            ["sample", "--participants", 6, "--prompt", 20, "--new-tokens", 5, "--quantize", "int8",
             "--peer-batches", 3],
            ["ours", "ours int8", "peer"],
            {"against the peer", "of the measured bandwidth"},
        ),
        (
            ["score", "--answers", 4, "--seconds", 0, "--peer-answers", 2, "--peer-batches", 2],
            ["ours", "peer"],
            {"against the peer"},
        ),
        (
            ["attention", "--slots", 320],
            ["ours", "peer"],
            {"the least of the ratios", "relative difference of values and gradients"},
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)  # fmt: skip
def test_the_benchmarks_of_a_gpu_run_to_their_end(as_on_a_gpu, words, sides, named):
    one = found(*words, "--device", "gpu", "--rounds", 1)
    check(one, sides, 1)
    assert set(goals(one)) == named
    if words[0] == "train":
        (ours,) = (note for note in one.notes if note.startswith("ours: "))
        assert ours.count("observations a second, compiled in") == len(bench_train.OURS["gpu"])


def test_every_figure_is_written_with_what_it_was_made_by(tmp_path, monkeypatch, capsys):
    path = tmp_path / "metrics.json"
    words = ["metrics", "--resamples=50", "--loop=1", "--rounds=2", f"--json={path}"]
    monkeypatch.setattr(bench.sys, "argv", ["tools/bench.py", *words])
    with pytest.raises(SystemExit):
        bench.main()
    assert f"figures: {path}" in capsys.readouterr().out
    written = json.loads(path.read_text())
    assert written["command"].endswith(" ".join(words))
    assert written["versions"]["jax"] == jax.__version__
    assert set(written["ratio"]["people"]) == {"median", "min", "max"}
    assert len(written["runs"]["ours"]) == 2


def test_a_file_that_can_not_be_written_is_said_before_anything_runs(monkeypatch, capsys):
    monkeypatch.setattr(bench.bench_metrics, "run", None)
    monkeypatch.setattr(bench.sys, "argv", ["bench.py", "metrics", "--json=/no/such/folder/a.json"])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 2
    assert "/no/such/folder/a.json" in capsys.readouterr().err


def test_figures_are_those_of_scipy():
    one = found("metrics", "--resamples", 600, "--loop", 1, "--rounds", 1)
    check(one, ["ours", "people", "figures", "histograms"], 1)
    assert goals(one)["largest difference of a point estimate"].figure < 1e-9
    assert one.settings["choices"] == "65,596"


def test_forest_attention_is_attention_with_a_dense_mask(in_one_process):
    one = found("attention", "--rounds", 1, "--slots", 320, "--rows", 2)
    check(one, ["ours", "peer"], 1)
    assert set(one.ratio) == {"games", "texts", "causal"}
    assert goals(one)["relative difference of values and gradients"].holds


def test_operations_are_counted_from_the_arrays(tmp_path):
    at = bench_models.Where("cpu", "tiny", "float32")
    tokenizer = bench_models.make(tmp_path, at, ["Give 3 of 10.", "[3]"])
    config, params = bench_models.load(tmp_path, "float32")
    adapter = peft.load(tmp_path / bench_models.ADAPTER, config)
    prompt = tokenizer.prompt(asked("", "Give 3 of 10."))
    paths = [
        forests.Encoded.of(prompt, tokenizer.answer(f"[{number}]"), 1.0 + number)
        for number in range(4)
    ]
    built = forests.build(paths, 64)
    forest, reads = built.forest, built.reads
    used = int(reads.slots[0].max()) + 1
    layers = params["layers"]
    linears = sum(
        layers[part][name]["weight"].size
        for part in ("self_attn", "mlp")
        for name in layers[part]
        if name.endswith("_proj")
    )
    pairs = int(forests.mask(forest)[0, :used].sum())
    read = len(set(reads.slots[0].tolist()) - {0})
    trained = sum(leaf.size for leaf in jax.tree.leaves(adapter.weights))
    expected = used * (4 * linears + 6 * trained) + 4 * read * params["lm_head"]["weight"].size
    # Two products forward and four backward, each of two operations a pair and feature.
    expected += pairs * 12 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    found = bench_train.operations(config, adapter, slots=used, pairs=pairs, reads=read)
    assert found == expected


def test_without_weights_both_sides_draw_their_own(tmp_path):
    at = bench_models.Where("cpu", "tiny", "bfloat16")
    bench_models.make(tmp_path, at, ["Give 3 of 10."])
    (tmp_path / "model.safetensors").unlink()
    assert not bench_models.has_weights(tmp_path)
    config, params = bench_models.load(tmp_path, "bfloat16")
    assert jax.tree.map(lambda leaf: leaf.shape, params) == jax.tree.map(
        lambda leaf: leaf.shape, shapes(config)
    )
    drawn = np.asarray(params["layers"]["mlp"]["up_proj"]["weight"], np.float32)
    assert drawn.std() == pytest.approx(0.02, rel=0.01)
    assert not np.array_equal(drawn[0], drawn[1])
    peer = bench_peers.load(str(tmp_path), "cpu", "bfloat16", with_weights=False)
    assert sum(weight.numel() for weight in peer.parameters()) == sum(
        leaf.size for leaf in jax.tree.leaves(params)
    )
    assert {str(weight.dtype) for weight in peer.parameters()} == {"torch.bfloat16"}


def test_settings_out_of_memory_are_passed_over():
    torch = bench_peers.torch

    def rate(setting):
        if setting > 2:
            raise torch.OutOfMemoryError("no room")
        return float(setting)

    assert bench_peers.quickest([1, 2, 4], rate, "rows") == (
        2,
        "1: 1.0 rows a second; 2: 2.0 rows a second; 4: out of memory",
    )
    with pytest.raises(MemoryError, match="8: out of memory"):
        bench_peers.quickest([8], rate, "rows")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["score", "--shape", "8b"], "--device gpu"),
        (["train", "--data", "packed", "--slots", "1"], "--slots 1: too short"),
    ],
)
def test_what_can_not_be_run_is_said(words, said):
    with pytest.raises(UserError, match=said):
        found(*words)


def test_a_device_that_is_not_here_is_said():
    if bench_models.Path("/dev/nvidiactl").exists():
        pytest.skip("there is an NVIDIA GPU here")
    with pytest.raises(UserError, match="no NVIDIA GPU"):
        found("sample", "--device", "gpu")


def test_the_100m_shape_has_a_hundred_million_parameters():
    leaves = jax.tree.leaves(shapes(bench_models.SHAPES["100m"]))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == pytest.approx(100e6, rel=0.02)
    leaves = jax.tree.leaves(shapes(bench_models.SHAPES["8b"]))
    # Llama 3.1 8B's own number.
    assert sum(math.prod(leaf.shape) for leaf in leaves) == 8_030_261_248


def test_rows_are_encoded_beside_datasets(in_one_process):
    one = found("data", "--parts", "encode", "--rounds", 1, "--encoded", 200)
    check(one, ["ours", "peer"], 1)
    # Random words are as many tokens to both; a conversation has its markup beside them.
    ours, peer = (one.runs[side][0]["tokens a row"] for side in ("ours", "peer"))
    assert peer < ours < 1.5 * peer


def test_the_configs_of_benchmarks_are_valid(tmp_path):
    texts = str(tmp_path / "texts.jsonl")
    sizes = {"examples": texts, "slots": 256}
    for module, given in (
        (bench_processes, {"rows": 4}),
        (bench_pipeline, {"rows_per_step": 4, "model": str(tmp_path)}),
    ):
        path = tmp_path / f"{module.__name__}.py"
        path.write_text(module.CONFIG.format(**sizes, **given))
        settings = bench_train.config_file(str(path))
        settings.workdir = str(tmp_path / "run")
        befm_config.validate(settings)
        assert settings.data.rows_per_step == 4

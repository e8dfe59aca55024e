"""PEFT's file format against PEFT: the same linears, ranks, scalings and logits, both ways."""

import contextlib
import copy
import dataclasses
import json
import os
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from befm_jax.adapters import lora
from befm_jax.adapters import peft as peft_files
from befm_jax.adapters.lora import AdapterError, LoraSpec
from befm_jax.adapters.spec import module_name
from befm_jax.files import NotWrittenError
from befm_jax.llama.model import shapes
from tests.helpers.adapters import TINY, UNEVEN, random_b
from tests.helpers.parity import (
    carried_over,
    our_logits,
    random_tokens,
    reference_logits,
    reference_model,
)
from tests.helpers.small import SMALL, small_model

LAYERS = 4
# Keys that overlap, in alphabetical order: PEFT sorts them on saving, and the first one counts.
PATTERNS = {
    "rank_pattern": {"down_proj": 2, r"layers\.[01]\..*": 7, "model.layers.3.self_attn.q_proj": 1},
    "alpha_pattern": {r"^model\.layers\.2\.mlp\.down_proj": 3.5, "layers.1.*": 2, "q_proj": 9},
}
# PEFT's options for every supported kind of adapter.
KINDS = {
    "short names and suffixes": {"target_modules": ["q_proj", "mlp.down_proj", "1.mlp.up_proj"]},
    "whole names": {
        "target_modules": ["model.layers.1.self_attn.v_proj", "model.layers.3.mlp.gate_proj"]
    },
    "pattern": {"target_modules": r"model\.layers\.[13]\.(self_attn|mlp)\.(q|o|gate)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "excluded names": {
        "target_modules": "all-linear",
        "exclude_modules": ["o_proj", "layers.2.mlp.up_proj"],
    },
    "excluded pattern": {
        "target_modules": ["k_proj", "up_proj"],
        "exclude_modules": r"model\.layers\.[02]\..*",
    },
    "patterns of ranks": {"target_modules": ["q_proj", "v_proj", "down_proj"], **PATTERNS},
    "patterns of ranks, rslora": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "use_rslora": True,
        **PATTERNS,
    },
    "one layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 2},
    "some layers": {
        "target_modules": ["q_proj", "up_proj"],
        "layers_to_transform": [0, 3],
        "layers_pattern": "layers",
        "rank_pattern": {r"3\.mlp\.up_proj": 6},
    },
    "some layers and a whole name": {
        "target_modules": ["q_proj", "model.layers.1.mlp.up_proj"],
        "layers_to_transform": [3],
    },
    "dropout": {"target_modules": ["v_proj"], "lora_dropout": 0.25},
}
every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A transformers model, the same model here, and tokens."""
    reference = reference_model(num_hidden_layers=LAYERS, **TINY)
    config, params = carried_over(reference, tmp_path_factory.mktemp("model"))
    return reference, config, params, random_tokens(config, 2, 50)


def made_by_peft(reference, options):
    """A copy of the model with an adapter of PEFT's, its `B` random."""
    torch.manual_seed(3)
    model = peft.get_peft_model(
        copy.deepcopy(reference),
        peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **options),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.eval()


def loaded_by_peft(reference, directory):
    with warnings.catch_warnings():
        # PEFT warns of a tensor that is missing or not used.
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(copy.deepcopy(reference), directory).eval()


def in_peft(model):
    """Name -> rank and scaling of every module that has an adapter in PEFT."""
    return {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def here(plan):
    """The same of a plan."""
    return {
        module_name(path, layer): (rank, scaling)
        for path, layers in plan.items()
        for layer, (rank, scaling) in enumerate(zip(*layers, strict=True))
        if rank
    }


def as_spec(r=4, lora_alpha=6, **options):
    """`LoraSpec` of PEFT's options."""

    def fixed(names):
        return tuple(names) if isinstance(names, list) else names

    layers = options.get("layers_to_transform")
    before = options.get("layers_pattern")
    return LoraSpec(
        rank=r,
        alpha=lora_alpha,
        rslora=options.get("use_rslora", False),
        dropout=options.get("lora_dropout", 0.0),
        targets=fixed(options["target_modules"]),
        exclude_modules=fixed(options.get("exclude_modules") or ()),
        rank_pattern=tuple(options.get("rank_pattern", {}).items()),
        alpha_pattern=tuple(options.get("alpha_pattern", {}).items()),
        layers_to_transform=(layers,) if isinstance(layers, int) else fixed(layers) or None,
        layers_pattern=(before,) if isinstance(before, str) else fixed(before) or (),
    )


@every_kind
def test_an_adapter_of_pefts_has_the_same_logits_here(tiny, tmp_path, options):
    reference, config, params, tokens = tiny
    theirs = made_by_peft(reference, options)
    theirs.save_pretrained(tmp_path)
    adapter = peft_files.load(tmp_path, config)
    assert here(adapter.spec.plan(params)) == in_peft(theirs)
    assert adapter.spec.dropout == options.get("lora_dropout", 0.0)
    ours = our_logits(config, lora.attach(params, adapter), tokens)
    np.testing.assert_allclose(ours, reference_logits(theirs, tokens), atol=2e-5)
    assert np.abs(ours - reference_logits(reference, tokens)).max() > 0.05


@every_kind
def test_an_adapter_made_here_has_the_same_logits_in_peft_and_comes_back(tiny, tmp_path, options):
    reference, config, params, tokens = tiny
    spec = as_spec(**options)
    adapter = random_b(lora.init_from(jax.random.key(1), params, spec))
    peft_files.save(tmp_path / "ours", adapter, "base")
    theirs = loaded_by_peft(reference, tmp_path / "ours")
    assert in_peft(theirs) == here(spec.plan(params))
    ours = our_logits(config, lora.attach(params, adapter), tokens)
    np.testing.assert_allclose(ours, reference_logits(theirs, tokens), atol=2e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    for back in (peft_files.load(tmp_path / name, config) for name in ("ours", "theirs")):
        assert here(back.spec.plan(params)) == here(spec.plan(params))
        assert back.weights.keys() == adapter.weights.keys()
        for path, weight in adapter.weights.items():
            for part in ("a", "b"):
                np.testing.assert_array_equal(back.weights[path][part], weight[part])


def test_the_order_of_patterns_is_kept(tiny, tmp_path):
    reference, config, params, _ = tiny
    patterns = ((r"model.*q_proj", 5), (r"layers\.0\..*", 3))
    spec = LoraSpec(4, 8.0, rank_pattern=patterns, alpha_pattern=patterns)
    peft_files.save(tmp_path, lora.init_from(jax.random.key(1), params, spec), "base")
    assert in_peft(loaded_by_peft(reference, tmp_path)) == here(spec.plan(params))
    assert peft_files.load(tmp_path, config).spec == spec


@pytest.mark.parametrize("kind", ["all-linear", "patterns of ranks, rslora"])
def test_adapters_of_qwen3_go_both_ways(tmp_path, kind):
    """The family that the 4B adapter of Be.FM 1.5 sits on."""
    reference = reference_model(num_hidden_layers=LAYERS, model_type="qwen3", **TINY)
    config, params = carried_over(reference, tmp_path / "model")
    tokens = random_tokens(config, 2, 50)
    theirs = made_by_peft(reference, KINDS[kind])
    theirs.save_pretrained(tmp_path / "adapter")
    adapter = peft_files.load(tmp_path / "adapter", config)
    ours = our_logits(config, lora.attach(params, adapter), tokens)
    np.testing.assert_allclose(ours, reference_logits(theirs, tokens), atol=2e-5)
    assert np.abs(ours - our_logits(config, params, tokens)).max() > 0.05
    peft_files.save(tmp_path / "ours", adapter, "base")
    back = loaded_by_peft(reference, tmp_path / "ours")
    np.testing.assert_allclose(reference_logits(back, tokens), ours, atol=2e-5)


def test_only_real_ranks_and_layers_are_written(tmp_path):
    _, params = small_model()
    peft_files.save(tmp_path, lora.init_from(jax.random.key(0), params, UNEVEN), "base")
    found = {key: tensor.shape for key, tensor in load_file(tmp_path / peft_files.WEIGHTS).items()}
    stem = "base_model.model.model.layers"
    assert f"{stem}.0.self_attn.k_proj.lora_A.weight" not in found
    assert found[f"{stem}.0.self_attn.q_proj.lora_A.weight"] == (2, SMALL.hidden_size)
    assert found[f"{stem}.1.self_attn.q_proj.lora_A.weight"] == (4, SMALL.hidden_size)
    assert found[f"{stem}.1.mlp.up_proj.lora_B.weight"] == (SMALL.intermediate_size, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_stored_in_half_precision_are_read_as_float32(tiny, tmp_path, dtype):
    reference, config, params, tokens = tiny
    made_by_peft(reference, KINDS["all-linear"]).save_pretrained(tmp_path)
    file = tmp_path / peft_files.WEIGHTS
    save_torch({key: tensor.to(dtype) for key, tensor in load_torch(file).items()}, file)
    adapter = peft_files.load(tmp_path, config)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapter)} == {jnp.dtype(jnp.float32)}
    theirs = reference_logits(loaded_by_peft(reference, tmp_path), tokens)
    ours = our_logits(config, lora.attach(params, adapter), tokens)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


DEEP = 12  # layers 1 and 11 end alike
LINEARS = tuple(LoraSpec(1, 1.0).plan(shapes(SMALL)))
DEEP_SHAPES = shapes(dataclasses.replace(SMALL, num_hidden_layers=DEEP))
NAMES = (
    "q_proj", "v_proj", "down_proj", "self_attn.q_proj", "layers.1.mlp.up_proj", "1.mlp.up_proj",
    "model.layers.11.mlp.down_proj", "model.layers.1.self_attn.q_proj", "_proj", "proj", "mlp",
    "input_layernorm", "lm_head", "embed_tokens", "layers.1",
)  # fmt: skip
EXPRESSIONS = (
    r".*\.q_proj", r"model\.layers\.(0|11)\.mlp\..*_proj", ".*_proj", "q_proj", r".*\.mlp\..*",
    r"layers\..*_proj", "model.layers.1..*_proj", "all-linear", "ALL-Linear", ".*",
)  # fmt: skip
KEYS = (
    "q_proj", ".*q_proj", "self_attn.*", "^model.layers.1.self_attn.q_proj", "layers.1..*",
    r"layers\.1\..*", "1.mlp.up_proj|v_proj", "proj", "down_proj", "k_proj",
)  # fmt: skip


def some(values, least=1):
    return st.lists(st.sampled_from(values), min_size=least, max_size=4, unique=True)


@st.composite
def peft_options(draw):
    listed = draw(st.booleans())
    options = {
        "r": draw(st.integers(1, 9)),
        "lora_alpha": draw(st.integers(1, 30)),
        "use_rslora": draw(st.booleans()),
        "target_modules": draw(some(NAMES) if listed else st.sampled_from(EXPRESSIONS)),
        "exclude_modules": draw(
            st.none() | some((*NAMES, "layers.2.mlp.down_proj"), 0) | st.sampled_from(EXPRESSIONS)
        ),
        "rank_pattern": draw(st.dictionaries(st.sampled_from(KEYS), st.integers(1, 9))),
        "alpha_pattern": draw(st.dictionaries(st.sampled_from(KEYS), st.integers(1, 30))),
    }
    if listed:
        layers = st.integers(0, DEEP - 1)
        options["layers_to_transform"] = draw(st.none() | layers | st.lists(layers, max_size=4))
        if options["layers_to_transform"] not in (None, []):
            before = ("layers", "blocks", ["blocks", "layers"], "l.*", None)
            options["layers_pattern"] = draw(st.sampled_from(before))
    return options


@settings(max_examples=150)
@given(peft_options())
def test_random_options_reach_what_they_reach_in_peft(options):
    """Where PEFT makes an adapter, ranks and scalings are the same; where it fails, so do we."""
    with torch.device("meta"):
        model = reference_model(num_hidden_layers=DEEP, **TINY)
    spec, theirs = as_spec(**options), None
    with warnings.catch_warnings(), contextlib.suppress(ValueError):
        warnings.simplefilter("ignore")
        theirs = in_peft(peft.get_peft_model(model, peft.LoraConfig(**options)))
    if theirs is None:
        with pytest.raises(AdapterError):
            spec.plan(DEEP_SHAPES)
        return
    if {"lm_head", "model.embed_tokens"} & set(theirs):
        with pytest.raises(AdapterError):
            spec.plan(DEEP_SHAPES)
    in_layers = {name: found for name, found in theirs.items() if name.startswith("model.layers.")}
    assert here({path: spec.per_layer(path, DEEP) for path in LINEARS}) == in_layers


def test_what_only_an_adapter_here_must_not_have_is_refused():
    names = tuple(module_name(f"layers/{name}", layer) for layer in range(DEEP) for name in (
        "self_attn/q_proj", "mlp/up_proj"
    ))  # fmt: skip
    with pytest.raises(AdapterError, match=r"full name .* beside layers_to_transform"):
        LoraSpec(4, 8.0, targets=names, layers_to_transform=(3,)).plan(DEEP_SHAPES)
    with pytest.raises(AdapterError, match=r"layers_to_transform has 12; .* layers 0 to 11"):
        LoraSpec(4, 8.0, layers_to_transform=(3, 12)).plan(DEEP_SHAPES)
    with pytest.raises(AdapterError, match=r"alpha_pattern: 'k_proj' matches no linear that has"):
        LoraSpec(4, 8.0, targets=("q_proj",), alpha_pattern=(("k_proj", 1.0),)).plan(DEEP_SHAPES)


@pytest.fixture
def written(tmp_path):
    """A good adapter's directory, for `SMALL`."""
    _, params = small_model()
    adapter = random_b(lora.init(jax.random.key(0), params, rank=2))
    peft_files.save(tmp_path, adapter, "base")
    return tmp_path


def refused(directory, *words, error=AdapterError):
    with pytest.raises(error) as caught:
        peft_files.load(directory, SMALL)
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("peft_type", "IA3", "'LORA'"),
        ("peft_type", None, "'LORA'"),
        ("bias", "all", "'none'"),
        ("use_dora", True, "not supported"),
        ("modules_to_save", ["lm_head"], "not supported"),
        ("lora_bias", True, "not supported"),
        ("trainable_token_indices", [1], "not supported"),
        ("target_parameters", ["mlp.experts"], "not supported"),
        ("layer_replication", [[0, 2], [1, 2]], "not supported"),
        ("alora_invocation_tokens", [5, 6], "not supported"),
        ("use_qalora", True, "not supported"),
        ("megatron_config", {"hidden_size": 8}, "not supported"),
        ("use_bdlora", {}, "not supported"),
        ("kasa_config", {}, "not supported"),
        ("velora_config", {"scale": 1.0}, "not supported"),
        ("monteclora_config", {}, "not supported"),
        ("arrow_config", {"top_k": 3}, "not supported"),
        ("something_of_next_year", 1, "not supported"),
        *(
            ("init_lora_weights", kind, "changes the base")
            for kind in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")
        ),
        ("r", None, "missing"),
        ("r", 0, "whole number"),
        ("r", 2.0, "whole number"),
        ("r", True, "whole number"),
        ("r", 5, "says 5"),
        ("r", 10**15, "says 1000000000000000"),
        ("lora_alpha", None, "missing"),
        ("lora_alpha", "16", "a number"),
        ("lora_alpha", float("nan"), "a number"),
        ("lora_alpha", 10**309, "a number"),
        ("lora_alpha", 1e300, "a number that float32 holds"),
        ("alpha_pattern", {"q_proj": 10**309}, "numbers"),
        ("r", 10**309, "whole number"),
        ("target_modules", r"(a|b|c|.|[a-z])*\d\d\d", "too long"),
        ("target_modules", "(" * 5000 + ")" * 5000, "not a regular expression"),
        ("target_modules", [f"x{number}" for number in range(300_000)], "300,000 entries"),
        ("exclude_modules", r"(a|b|c|.|[a-z])*\d\d\d", "too long"),
        ("rank_pattern", {r"(a|b|c|.|[a-z])*\d\d\d": 3}, "too long"),
        ("rank_pattern", {f"x{number}": 3 for number in range(300_000)}, "300,000 entries"),
        ("layers_to_transform", list(range(300_000)), "300,000 entries"),
        ("lora_dropout", 1.0, "below 1"),
        ("use_rslora", "yes", "true or false"),
        ("target_modules", None, "missing"),
        ("target_modules", [], "empty"),
        ("target_modules", [3], "list of names"),
        ("target_modules", ["q_proj", "v_prj"], "did you mean v_proj"),
        ("target_modules", ["model.layers.7.mlp.up_proj"], "did you mean model.layers."),
        ("target_modules", ["q_proj", "lm_head"], "LoRA on lm_head is not supported"),
        ("target_modules", ["embed_tokens"], "LoRA on embed_tokens is not supported"),
        ("target_modules", "(q_proj", "not a regular expression"),
        ("target_modules", "nothing", "matches no linear"),
        ("exclude_modules", "[", "not a regular expression"),
        ("exclude_modules", ["mlp", "self_attn", *lora.ALL_LINEAR], "leave no linear"),
        ("exclude_modules", 3, "list of names"),
        ("rank_pattern", {"q_proj": 0}, "whole numbers"),
        ("rank_pattern", {"(": 3}, "not a regular expression"),
        ("rank_pattern", {"q_prj": 3}, "'q_prj' matches no linear"),
        ("rank_pattern", ["q_proj"], "an object"),
        ("rank_pattern", {"1.mlp.up_proj": 3}, "says 3"),
        ("alpha_pattern", {"q_proj": "3"}, "numbers"),
        ("layers_to_transform", "1", "layer's number"),
        ("layers_to_transform", [True], "layer's number"),
        ("layers_to_transform", 2, "layers 0 to 1"),
        ("layers_to_transform", [0], "adapter_config.json gives model.layers.1"),
        ("layers_pattern", "layers", "layers_to_transform"),
        ("layers_pattern", 1, "a name"),
    ],
)
def test_a_field_that_can_not_be_honoured_is_named(written, field, value, message):
    path = written / peft_files.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    refused(written, peft_files.CONFIG, field, message)


@pytest.mark.parametrize(
    "fields",
    [{"init_lora_weights": kind} for kind in (True, False, "gaussian", "eva", "orthogonal")]
    + [
        {"use_dora": False, "modules_to_save": None, "alora_invocation_tokens": []},
        {"qalora_group_size": 16, "megatron_core": "megatron.core", "loftq_config": {}},
        {"layers_to_transform": None, "exclude_modules": [], "rank_pattern": {}},
        {"layers_to_transform": [], "lora_dropout": None},
        {"layers_to_transform": [0, 1]},
    ],
    ids=str,
)
def test_fields_that_change_nothing_are_taken(written, fields):
    before = peft_files.load(written, SMALL)
    path = written / peft_files.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    after = peft_files.load(written, SMALL)
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(one, other)


def test_every_field_that_peft_writes_is_known(written):
    """Whatever the installed PEFT writes for plain LoRA is read: no default is refused."""
    path = written / peft_files.CONFIG
    ours = json.loads(path.read_text())
    peft.LoraConfig(r=2, lora_alpha=4, target_modules=ours["target_modules"]).save_pretrained(
        written
    )
    assert set(json.loads(path.read_text())) > set(ours)
    peft_files.load(written, SMALL)


STEM = "base_model.model.model.layers"


@pytest.mark.parametrize(
    ("key", "tensor", "words"),
    [
        (f"{STEM}.1.mlp.up_proj.lora_A.weight", None, ["lacks"]),
        (f"{STEM}.1.mlp.up_proj.lora_A.weight", np.ones((3, 32), np.float32), ["rank 3", "says 2"]),
        (f"{STEM}.1.mlp.up_proj.lora_B.weight", np.ones((48, 3), np.float32), ["rank 3", "says 2"]),
        (
            f"{STEM}.1.mlp.up_proj.lora_B.weight",
            np.ones((40, 2), np.float32),
            ["[40, 2]", "[48, 2]"],
        ),
        (f"{STEM}.1.mlp.up_proj.lora_B.weight", np.ones(96, np.float32), ["[96]", "[48, 2]"]),
        (f"{STEM}.1.mlp.up_proj.lora_B.weight", np.ones((48, 2), np.int32), ["I32", "F32"]),
        (f"{STEM}.2.mlp.up_proj.lora_A.weight", np.ones((2, 32), np.float32), ["layers 0 to 1"]),
        (f"{STEM}.1.mlp.gate.lora_A.weight", np.ones((2, 32), np.float32), ["no adapter"]),
        (f"{STEM}.1.mlp.up_proj.lora_magnitude_vector", np.ones(48, np.float32), ["DoRA"]),
        (f"{STEM}.1.mlp.up_proj.lora_B.bias", np.ones(48, np.float32), ["not a LoRA matrix"]),
        ("base_model.model.lm_head.weight", np.ones((97, 32), np.float32), ["trained lm_head"]),
        (
            "base_model.model.model.embed_tokens.lora_embedding_A",
            np.ones((2, 97), np.float32),
            ["LoRA on embed_tokens"],
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(written, key, tensor, words):
    file = written / peft_files.WEIGHTS
    tensors = load_file(file)
    tensors.pop(key, None)
    save_file(tensors if tensor is None else tensors | {key: tensor}, file)
    refused(written, peft_files.WEIGHTS, key, *words)


def test_a_missing_truncated_or_pickled_file_is_named(written):
    file = written / peft_files.WEIGHTS
    file.write_bytes(file.read_bytes()[:-10])
    refused(written, str(file), "not a readable safetensors file")
    file.unlink()
    refused(written, str(file), "no such file", error=FileNotFoundError)
    (written / peft_files.PICKLE).write_bytes(b"\x80\x02")
    refused(written, str(written / peft_files.PICKLE), "never read", "save_pretrained")
    (written / peft_files.PICKLE).unlink()
    (written / peft_files.CONFIG).write_text("{")
    file.write_bytes(b"")
    refused(written, peft_files.CONFIG, "JSON")


def test_arrays_that_hold_more_than_the_spec_says_are_not_saved(tmp_path):
    _, params = small_model()
    adapter = random_b(lora.init_from(jax.random.key(0), params, UNEVEN))
    full = jax.tree.map(jnp.ones_like, adapter)
    with pytest.raises(AdapterError, match=r"layers/\w+/\w+, layer \d: the spec says rank"):
        peft_files.save(tmp_path / "new", full, "base")
    wider = lora.Adapter(adapter.weights, dataclasses.replace(UNEVEN, rank_pattern=()))
    with pytest.raises(AdapterError, match="the arrays are of rank 6"):
        peft_files.save(tmp_path / "new", wider, "base")
    assert not (tmp_path / "new").exists()


WRITE_TOO_MUCH = """
import resource, signal, sys
import jax
from tests.helpers.small import small_model
from befm_jax.adapters import lora, peft
from befm_jax.errors import UserError

_, params = small_model(seed=1)
adapter = lora.init(jax.random.key(1), params, rank=int(sys.argv[2]))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    peft.save(sys.argv[1], adapter, "x" * int(sys.argv[3]))
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize(("rank", "base_name"), [(16, 9), (1, 30_000)], ids=["weights", "config"])
def test_a_write_that_fails_is_said_and_leaves_the_old_files(written, rank, base_name):
    """The operating system itself refuses to let the one file or the other grow: a full disk."""
    before = {path.name: path.read_bytes() for path in written.iterdir()}
    done = subprocess.run(
        [sys.executable, "-c", WRITE_TOO_MUCH, str(written), str(rank), str(base_name)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"{written}: can't be written" in done.stdout
    assert "File too large" in done.stdout
    assert {path.name: path.read_bytes() for path in written.iterdir()} == before


def test_a_place_that_can_not_be_written_to_is_named(tmp_path):
    _, params = small_model()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(NotWrittenError, match="file: can't be written"):
        peft_files.save(tmp_path / "file", lora.init(jax.random.key(0), params, rank=2), "base")

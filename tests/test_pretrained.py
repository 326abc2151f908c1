"""Weights and configurations under the names of other programs."""

import re
from dataclasses import asdict, replace

import pytest
import torch

from model import GPT, GPTConfig
from model.formats import config_from, config_to, layout_for
from model.pretrained import weights_from, weights_to

SMALL = GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32)
NANOGPT = replace(SMALL, activation="gelu_erf", bias=False)
# Parameters of a layer, without biases of layer norms and projections.
LAYER = {"ln_1.weight": (32,), "attn.c_attn.weight": (32, 96), "attn.c_proj.weight": (32, 32),
         "ln_2.weight": (32,), "mlp.c_fc.weight": (32, 128), "mlp.c_proj.weight": (128, 32)}
BIASES = {"ln_1.bias": (32,), "attn.c_attn.bias": (96,), "attn.c_proj.bias": (32,), "ln_2.bias": (32,),
          "mlp.c_fc.bias": (128,), "mlp.c_proj.bias": (32,)}


def gpt2_tensors(prefix: str = "transformer.", seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights with the names and shapes of GPT-2's published ones."""
    shapes = {"wte.weight": (64, 32), "wpe.weight": (16, 32), "ln_f.weight": (32,), "ln_f.bias": (32,)}
    for layer in range(2):
        shapes |= {f"h.{layer}.{name}": shape for name, shape in (LAYER | BIASES).items()}
    draw = torch.Generator().manual_seed(seed)
    return {f"{prefix}{name}": torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_gpt2_weights_return_bit_identical():
    published = gpt2_tensors()
    state = weights_from("gpt2", SMALL, published)
    assert {tensor.data_ptr() for tensor in state.values()} <= {tensor.data_ptr() for tensor in published.values()}  # no copies
    GPT(SMALL).load_state_dict(state)
    assert state["h.1.mlp.c_fc.weight"].shape == (128, 32)
    assert torch.equal(state["h.1.mlp.c_fc.weight"], published["transformer.h.1.mlp.c_fc.weight"].T)
    assert equal(weights_to("gpt2", SMALL, state), published)


@pytest.mark.parametrize("prefix", ["", "transformer.", "_orig_mod.transformer."])
def test_prefixes_masks_and_a_tied_head_do_not_matter(prefix):
    tensors = gpt2_tensors(prefix)
    tensors |= {f"{prefix}h.0.attn.bias": torch.ones(1, 1, 16, 16), f"{prefix}h.0.attn.masked_bias": torch.tensor(-1e4),
                "lm_head.weight": tensors[f"{prefix}wte.weight"]}
    assert equal(weights_from("gpt2", SMALL, tensors), weights_from("gpt2", SMALL, gpt2_tensors()))


def test_without_biases_gpt2_gets_zeros():
    torch.manual_seed(0)
    model = GPT(NANOGPT)
    published = dict(weights_to("gpt2", NANOGPT, model.state_dict()))
    assert published.keys() == gpt2_tensors().keys()
    assert published["transformer.h.1.attn.c_attn.bias"].equal(torch.zeros(96))
    assert equal(weights_from("gpt2", NANOGPT, published), model.state_dict())
    published["transformer.ln_f.bias"] = torch.ones(32)
    with pytest.raises(ValueError, match=r"transformer.ln_f.bias with values other than 0"):
        weights_from("gpt2", NANOGPT, published)


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_weights_return_bit_identical(bias):
    config = replace(NANOGPT, bias=bias)
    torch.manual_seed(0)
    state = GPT(config).state_dict()
    published = weights_to("nanogpt", config, state)
    assert published["transformer.h.0.attn.c_attn.weight"].shape == (96, 32)
    assert published["lm_head.weight"] is published["transformer.wte.weight"]
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in published.items()}
    assert equal(weights_from("nanogpt", config, compiled), state)


def test_weights_in_16_bits_become_fp32():
    tensors = {name: tensor.bfloat16() for name, tensor in gpt2_tensors().items()}
    state = weights_from("gpt2", SMALL, tensors)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert torch.equal(state["wte.weight"], tensors["transformer.wte.weight"].float())


@pytest.mark.parametrize(("change", "message"), [
    ({"h.1.ln_2.bias": None}, "lack transformer.h.1.ln_2.bias that this configuration of gpt2 has."),
    ({"h.2.ln_1.bias": torch.ones(32), "h.2.ln_1.weight": torch.ones(32)},
     "have h.2.ln_1.bias and 1 more that this configuration of gpt2 does not have."),
    ({"h.0.attn.c_attn.weight": torch.ones(96, 32)},
     "have h.0.attn.c_attn.weight of the shape [96, 32]; this configuration of gpt2 has [32, 96]."),
    ({"wte.weight": torch.ones(64, 32, dtype=torch.int8)}, "have wte.weight of the type torch.int8"),
    ({"lm_head.weight": torch.ones(64, 32)}, "have lm_head.weight with other values than those of wte.weight"),
    ({"transformer.ln_f.bias": torch.ones(32)}, "have ln_f.bias twice, as ln_f.bias and transformer.ln_f.bias."),
    ({"evil\x1b[2J" + "x" * 200: torch.ones(1)}, r"have evil\x1b[2Jxxx"),
])
def test_wrong_tensors_are_named_in_one_sentence(change, message):
    tensors = {name: tensor for name, tensor in (gpt2_tensors("") | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        weights_from("gpt2", SMALL, tensors)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_weights_of_another_architecture_are_named():
    tensors = {"model.embed_tokens.weight": torch.ones(64, 32), "model.norm.weight": torch.ones(32)}
    with pytest.raises(ValueError, match=r"lack transformer.wte.weight and 27 more .* They have model.embed_tokens.weight, which"):
        weights_from("gpt2", SMALL, tensors)


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, activation="gelu_erf", tie_head=False)])
def test_gpt2s_configuration_returns(config):
    published = config_to("gpt2", config)
    assert published["architectures"] == ["GPT2LMHeadModel"] and published["n_positions"] == 16
    assert GPTConfig(**config_from("gpt2", published)) == config
    assert config_to("gpt2", replace(config, dropout=0.1))["attn_pdrop"] == 0.1


def test_gpt2s_published_configuration_is_our_default():
    """The values of the published config.json, which leaves out those that were added later."""
    published = {"activation_function": "gelu_new", "attn_pdrop": 0.1, "embd_pdrop": 0.1, "layer_norm_epsilon": 1e-05,
                 "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
                 "resid_pdrop": 0.1, "vocab_size": 50257}
    assert GPTConfig(**config_from("gpt2", published)) == GPTConfig()


def test_nanogpts_configuration_has_exact_gelu():
    arguments = {name: asdict(NANOGPT)[name] for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias", "dropout")}
    assert GPTConfig(**config_from("nanogpt", arguments)) == NANOGPT


@pytest.mark.parametrize(("change", "message"), [
    ({"n_embd": None}, "config.json lacks n_embd: it is no configuration of gpt2."),
    ({"n_embd": {}}, "config.json has n_embd={}, which is no number."),
    ({"activation_function": "relu"}, "activation_function=relu, which is not supported; supported are gelu_new, gelu"),
    ({"activation_function": []}, "activation_function=[], which is not supported"),
    ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06, which is not supported; supported are 1e-05."),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True, which is not supported"),
    ({"n_inner": 100}, "n_inner=100, which is not supported; supported are None, 128."),
])
def test_unsupported_configurations_are_named(change, message):
    published = config_to("gpt2", SMALL) | change
    with pytest.raises(ValueError, match=re.escape(message)):
        config_from("gpt2", {name: value for name, value in published.items() if value is not None})


MODERN = replace(SMALL, bias=False, position="rotary", norm="rms", qk_norm=True, activation="relu2", tie_head=False)
LLAMA = replace(SMALL, bias=False, position="rotary", norm="rms_gain", activation="swiglu", n_head=4, n_kv_head=2)
CLASSES = {
    "gpt2": ("gpt2", SMALL),
    "gpt2, no bias": ("gpt2", NANOGPT),
    "gpt2, own head": ("gpt2", replace(SMALL, tie_head=False, activation="relu2")),
    "nanochat": ("nanochat", replace(MODERN, embedding_norm=True)),
    "nanochat, grouped": ("nanochat", replace(MODERN, embedding_norm=True, n_head=4, n_kv_head=2, tie_head=True)),
    "qwen3": ("qwen3", MODERN),
    "qwen3, swiglu": ("qwen3", replace(LLAMA, qk_norm=True)),
    "llama": ("llama", LLAMA),
    "llama, relu2": ("llama", replace(MODERN, qk_norm=False, norm="rms_gain")),
}
every_class = pytest.mark.parametrize(("layout", "config"), CLASSES.values(), ids=CLASSES.keys())


def randomized(config: GPTConfig) -> GPT:
    """A model with large random weights, so that no bias is zero and no gain is one."""
    torch.manual_seed(0)
    model = GPT(config).eval()
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(0.2 * torch.randn(weights.shape))
    return model


@every_class
def test_each_model_returns_bit_identical_from_its_layout(layout, config):
    assert layout_for(config) == layout
    state = randomized(config).state_dict()
    published = weights_to(layout, config, state)
    assert equal(weights_from(layout, config, published), state)
    again = GPTConfig(**config_from(layout, config_to(layout, config)))
    # An import always has the parameters of the class: biases of GPT-2, gains of Llama.
    assert replace(again, bias=config.bias, norm=config.norm) == config
    assert GPT(again).load_state_dict(weights_from(layout, again, published))


@every_class
def test_transformers_computes_the_same_logits(layout, config):
    transformers = pytest.importorskip("transformers", "5", reason="needs transformers 5: pip install transformers")
    model = randomized(config)
    settings = transformers.AutoConfig.for_model(**config_to(layout, config))
    other = transformers.AutoModelForCausalLM.from_config(settings).eval()
    assert type(other).__name__ == config_to(layout, config)["architectures"][0]
    loaded = other.load_state_dict(weights_to(layout, config, model.state_dict()), strict=False)
    assert not loaded.unexpected_keys and set(loaded.missing_keys) <= {"lm_head.weight"}
    other.tie_weights()
    ids = torch.arange(16)[None]
    with torch.no_grad():
        logits = model(ids)
        assert torch.allclose(other(ids).logits, logits, rtol=0, atol=1e-5 * logits.abs().max())
        # And back: the names and shapes as transformers has them.
        assert equal(weights_from(layout, config, other.state_dict()), model.state_dict())


@pytest.mark.parametrize("config", [SMALL, LLAMA, replace(LLAMA, qk_norm=True, tie_head=False)], ids=["gpt2", "llama", "qwen3"])
def test_gguf_tensors_return_bit_identical(config):
    layout = layout_for(config, gguf=True)
    state = randomized(config).state_dict()
    published = weights_to(layout, config, state)
    assert "blk.1.attn_output.weight" in published and ("output.weight" in published) != config.tie_head
    assert equal(weights_from(layout, config, published), state)


def test_llamas_gguf_pairs_adjacent_rows():
    state = randomized(LLAMA).state_dict()
    published = weights_to("gguf-llama", LLAMA, state)
    keys = state["h.0.attn.c_attn.weight"][32:48]
    # Heads of width 8: row 1 of the first head rotates with row 5.
    assert torch.equal(published["blk.0.attn_k.weight"][:4], keys[[0, 4, 1, 5]])
    assert torch.equal(published["blk.0.attn_v.weight"], state["h.0.attn.c_attn.weight"][48:])


@pytest.mark.parametrize(("changes", "gguf", "message"), [
    ({"position": "rotary"}, False, "No class of transformers has this model: GPT2LMHeadModel, the nearest, does not have "
                                    "model.position=rotary (only learned)."),
    ({"n_kv_head": 1}, False, "model.n_kv_head=1 (only null)."),
    ({"activation": "gelu_erf"}, True, "No GGUF architecture has this model: gpt2, the nearest, does not have "
                                       "model.activation=gelu_erf (only gelu)."),
])
def test_a_model_that_no_class_has_is_refused(changes, gguf, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        layout_for(replace(SMALL, **changes), gguf)


@pytest.mark.parametrize(("change", "message"), [
    ({"rms_norm_eps": 1e-6}, "has rms_norm_eps=1e-06, which is not supported; supported are 1.1920928955078125e-07."),
    ({"rms_norm_eps": None}, "config.json lacks rms_norm_eps: it is no configuration of llama."),
    ({"intermediate_size": 100}, "has intermediate_size=100, which is not supported; supported are 96."),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "has rope_theta={'rope_type': 'llama3'"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "has rope_theta=500000.0, which is not supported"),
    ({"hidden_act": "gelu"}, "has hidden_act=gelu, which is not supported; supported are silu, relu."),
])
def test_unsupported_llamas_are_named(change, message):
    published = config_to("llama", LLAMA) | change
    with pytest.raises(ValueError, match=re.escape(message)):
        config_from("llama", {name: value for name, value in published.items() if value is not None})

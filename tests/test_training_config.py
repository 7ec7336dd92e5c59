"""Facts from a training config: what mmengine dumps, what people write, and what no one should."""

import tracemalloc

import pytest

from shardmerge.targets.adapter_facts import AdapterConfig
from shardmerge.targets.training_config import (
    MAX_CHARS,
    TrainingFacts,
    read_config_value,
    read_training_config,
)

# As mmengine's Config.pretty_text writes it: sorted keys, classes as strings, one assignment per name.
DUMPED = """\
SYSTEM = ''
accumulative_counts = 2
batch_size = 8
betas = (
    0.9,
    0.999,
)
custom_hooks = [
    dict(
        tokenizer=dict(
            pretrained_model_name_or_path='meta-llama/Meta-Llama-3-8B-Instruct',
            type='transformers.AutoTokenizer.from_pretrained'),
        type='xtuner.engine.hooks.DatasetInfoHook'),
]
evaluation_inputs = [
    'model = dict(freeze_llm=True)',
    'Please describe this picture',
]
launcher = 'pytorch'
model = dict(
    freeze_llm=False,
    freeze_visual_encoder=True,
    llm=dict(
        pretrained_model_name_or_path='meta-llama/Meta-Llama-3-8B-Instruct',
        trust_remote_code=True,
        type='transformers.AutoModelForCausalLM.from_pretrained'),
    pretrained_pth='./work_dirs/pretrain/iter_2181.pth',
    type='xtuner.model.LLaVAModel',
    visual_encoder=dict(
        pretrained_model_name_or_path='openai/clip-vit-large-patch14-336',
        type='transformers.CLIPVisionModel.from_pretrained'))
optim_type = 'torch.optim.AdamW'
prompt_template = dict(
    INSTRUCTION=
    '<|start_header_id|>user<|end_header_id|>\\n\\n{input}<|eot_id|>',
    SEP='\\n')
"""

# As a person writes it: names bound first, classes as objects, comments between.
WRITTEN = """\
from transformers import AutoModelForCausalLM
import torch
#######################################################################
llm_name_or_path = 'lmsys/vicuna-7b-v1.5'
visual_encoder_name_or_path = 'openai/clip-vit-large-patch14-336'  # noqa
data_root = './data/' + 'llava'
lora = dict(type=LoraConfig, r=64, lora_alpha=16)
nothing = None

model = dict(
    type=LLaVAModel,
    freeze_llm=True,
    freeze_visual_encoder=True,
    visual_select_layer=-3,
    projector_depth=3,
    llm=dict(
        type=AutoModelForCausalLM.from_pretrained,
        pretrained_model_name_or_path=llm_name_or_path,
        torch_dtype=torch.float16,
        quantization_config=dict(type=BitsAndBytesConfig, load_in_4bit=True)),
    llm_lora=lora,
    visual_encoder_lora=nothing,
    # where the images go
    visual_encoder={
        'type': CLIPVisionModel.from_pretrained,
        'pretrained_model_name_or_path': visual_encoder_name_or_path,
    })
"""


def test_dumped_by_mmengine():
    assert read_training_config(DUMPED) == TrainingFacts(
        freeze_llm=False,
        freeze_visual_encoder=True,
        llm_path="meta-llama/Meta-Llama-3-8B-Instruct",
        vision_path="openai/clip-vit-large-patch14-336",
    )


def test_written_by_hand():
    assert read_training_config(WRITTEN) == TrainingFacts(
        freeze_llm=True,
        freeze_visual_encoder=True,
        llm_path="lmsys/vicuna-7b-v1.5",
        vision_path="openai/clip-vit-large-patch14-336",
        visual_select_layer=-3,
        projector_depth=3,
        llm_lora=AdapterConfig(rank=64, alpha=16),
        visual_encoder_lora=None,
    )


def test_a_name_means_what_it_was_bound_to_before():
    text = "depth = 2\nmodel = dict(projector_depth=depth)\ndepth = 5\n"
    assert read_training_config(text).projector_depth == 2


def test_the_last_binding_of_the_model_counts():
    text = "model = dict(freeze_llm=True)\nmodel = dict(freeze_llm=False)\n"
    assert read_training_config(text).freeze_llm is False


def test_an_adapter_that_cannot_be_read_is_still_an_adapter():
    assert read_training_config("model = dict(llm_lora=make_lora(64))").llm_lora == AdapterConfig()
    assert read_training_config("model = dict(lora=dict(r=8, lora_alpha=16))").llm_lora == AdapterConfig(16, 8)


# As mmengine writes it: names that are no identifiers make a display, inside a call where a dict holds it.
DUMPED_LORA = """\
betas = (
    0.9,
    0.999,
)
model = dict(
    llm_lora=dict(
        alpha_pattern=dict({
            'layers.0.self_attn.q_proj': 64,
        }),
        bias='lora_only',
        fan_in_fan_out=True,
        lora_alpha=16,
        modules_to_save=[
            'lm_head',
            'embed_tokens',
        ],
        r=8,
        rank_pattern=dict({
            'layers.0.self_attn.q_proj': 32,
        }),
        target_modules=[
            'q_proj',
        ],
        type='peft.LoraConfig',
        use_dora=True,
        use_rslora=True),
    type='xtuner.model.LLaVAModel')
"""


def test_everything_an_adapter_config_says():
    assert read_training_config(DUMPED_LORA).llm_lora == AdapterConfig(
        rank=8,
        alpha=16,
        rslora=True,
        fan_in_fan_out=True,
        rank_pattern={"layers.0.self_attn.q_proj": 32},
        alpha_pattern={"layers.0.self_attn.q_proj": 64},
    )


@pytest.mark.parametrize(
    "odd", ["use_rslora=flag()", "rank_pattern=make()", "alpha_pattern={'a': x}", "rank_pattern=dict(**base)"]
)
def test_a_scale_that_cannot_be_read_is_unknown(odd):
    facts = read_training_config(f"model = dict(llm_lora=dict(r=8, lora_alpha=16, {odd}))").llm_lora
    assert facts == AdapterConfig(rank=8)


def test_the_golden_adapters(golden):
    facts = read_training_config((golden / "xtuner" / "lora_both" / "config.py").read_text("utf-8"))
    assert facts.llm_lora == AdapterConfig(rank=4, alpha=8)
    assert facts.visual_encoder_lora == AdapterConfig(rank=2, alpha=1)


@pytest.mark.parametrize(
    ("dotted", "value"),
    [
        ("model.llm_lora.r", 8),
        ("model.llm_lora.bias", "lora_only"),
        ("model.llm_lora.use_dora", True),
        ("model.llm_lora.target_modules.0", "q_proj"),
        ("betas.1", 0.999),
        ("betas.2", None),
        ("betas.-1", None),
        ("betas", None),
        ("model", None),
        ("model.nothing.r", None),
        ("model.llm_lora.r.x", None),
        ("nothing", None),
        ("", None),
        ("model.", None),
        ("(a+)+$.x", None),
    ],
)
def test_a_value_by_its_name(dotted, value):
    assert read_config_value(DUMPED_LORA, dotted) == value


def test_lists_of_unknown_length_are_unknown():
    text = "a = [1, *rest]\nb = [1, call(), 3]\nc = b\nc[0] = 2\n"
    assert [read_config_value(text, name) for name in ("a.0", "b.0", "b.1", "b.2", "c.0")] == [None, 1, None, 3, None]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "model = dict(type='LLaVAModel')\nnote = 'tiny'\n",
        "model = 3",
        "model = build()",
        "model = dict(**base, freeze_llm=True)",
        "model = {**base, 'freeze_llm': True}",
        "model = dict([('freeze_llm', True)])",
        "model = dict(freeze_llm='yes', projector_depth=True, visual_select_layer=2.0, llm='path')",
        "model = dict(freeze_llm=not False, projector_depth=1 + 1, visual_select_layer=-'2')",
        "model = dict(freeze_llm=True)\nmodel.update(freeze_llm=False)",
        "model = dict(freeze_llm=True)\nmodel['freeze_llm'] = False",
        "frozen = dict(x=True)\nfrozen['x'] = False\nmodel = frozen",
        "if True:\n    model = dict(freeze_llm=True)",
        "model: dict = dict(freeze_llm=True",
        "model = model",
        "a = b\nb = a\nmodel = dict(freeze_llm=a)",
    ],
)
def test_anything_else_is_unknown(text):
    assert read_training_config(text) == TrainingFacts()


@pytest.mark.parametrize(
    "text",
    [
        "model = " + "(" * 5000 + ")" * 5000,
        "model = " + "-" * 20000 + "1",
        "model = " + "1+" * 10000 + "1",
        "model = " + "a" + ".a" * 10000,
        "model = " + "dict(a=" * 150 + "1" + ")" * 150,
        "model = " + "9" * 6000,
        "model = dict(freeze_llm=True)\0",
        "model = '\udcff'",
        "model = '\\d'",
        "model = dict(freeze_llm=True\n" * 50,
        "model = " + "[" * 5000 + "]" * 5000,
        "a0 = 1\n" + "".join(f"a{i + 1} = [a{i}, a{i}]\n" for i in range(200)) + "model = a200",
        "a0 = 1\n" + "".join(f"a{i + 1} = dict(x=a{i}, y=a{i})\n" for i in range(200)) + "model = a200",
        "model = dict(x='" + "y" * MAX_CHARS + "')",
    ],
    ids=lambda text: text[:20].encode("ascii", "replace").decode(),
)
def test_hostile_text_is_unknown_and_costs_nothing(text):
    tracemalloc.start()
    try:
        assert read_training_config(text) == TrainingFacts()
        assert tracemalloc.get_traced_memory()[1] < 50 << 20
    finally:
        tracemalloc.stop()


def test_nothing_is_executed(tmp_path):
    bait = tmp_path / "executed"
    text = f"model = dict(llm=dict(pretrained_model_name_or_path=open({str(bait)!r}, 'w').name))"
    assert read_training_config(text) == TrainingFacts()
    assert not bait.exists()


def test_large_sections_beside_the_model_are_never_parsed():
    text = "datasets = [\n" + "    1,\n" * 200_000 + "]\nmodel = dict(freeze_llm=True)\n"
    tracemalloc.start()
    try:
        assert read_training_config(text).freeze_llm is True
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()

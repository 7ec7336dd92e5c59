"""Mistakes in configurations of mergekit, and what a mapping cannot say of them."""

from __future__ import annotations

from tests.conftest import GOLDEN
from tests.following import Row
from tests.hint_rows.given import Given, raw, told

MODELS = GOLDEN / "mergekit" / "models"
BASE, CHAT, CODE = (str(MODELS / name) for name in ("base", "chat", "code"))
PAIR = f"models: [{{model: {CHAT}}}, {{model: {CODE}}}]\n"
STOCK = f"base_model: {BASE}\nmerge_method: model_stock\n"


def config(text: str) -> Given:
    return raw(text, "init", "mapping.yaml")


def layers(model: str, low: int, high: int, more: str = "") -> str:
    return f"{{model: {model}, layer_range: [{low}, {high}]{more}}}"


def slices(*sources: str, method: str = "merge_method: passthrough\n") -> str:
    return "slices:\n" + "".join(f"  - sources: [{one}]\n" for one in sources) + method


TOKENS = GOLDEN / "mergekit" / "tokens"


def union(more: str) -> str:
    said = f"tokenizer: {{source: union{', ' + more if more else ''}}}"
    return f"models: [{{model: {TOKENS}/chat}}, {{model: {TOKENS}/code}}]\nmerge_method: karcher\n{said}\n"


TWO = f"{STOCK}name: middle\n{PAIR}---\nbase_model: {BASE}\nmerge_method: linear\nparameters: {{weight: 1}}\n"
UNEQUAL = f"{layers(CHAT, 0, 2)}, {layers(CODE, 0, 3)}"

ROWS = [
    Row(
        "a merge of no method",
        config(f"{STOCK}{PAIR}---\nname: x\n{PAIR}"),
        "missing-parameter",
        told("`merge_method: linear`", f"---\nname: x\n{PAIR}", ""),
    ),
    Row(
        "models and layers at once",
        config(f"{STOCK}{PAIR}slices: []\n"),
        "wrong-kind",
        told("write one of the two", "slices: []\n", ""),
    ),
    Row(
        "a residual weight",
        config(slices(layers(CHAT, 0, 4)).replace("]}]", "]}]\n    residual_weight: 1")),
        "not-sayable",
        told("remove it", "\n    residual_weight: 1", ""),
    ),
    Row(
        "a model without a path",
        config(f"{STOCK}models: [{{model: {CHAT}}}, {{parameters: {{}}}}]\n"),
        "missing-parameter",
        told("`model: PATH`", "{parameters: {}}", f"{{model: {CODE}}}"),
    ),
    Row(
        "layers that are no range",
        config(slices(layers(CHAT, 2, 2))),
        "wrong-kind",
        told("`layer_range: [0, 32]`", "[2, 2]", "[0, 4]"),
    ),
    Row(
        "a parameter's case without a value",
        config(f"merge_method: linear\nparameters: {{weight: [{{filter: mlp}}, {{value: 1}}]}}\n{PAIR}"),
        "missing-parameter",
        told("`value: NUMBER`", "filter: mlp", "filter: mlp, value: 1"),
    ),
    Row(
        "a method that is nearly one",
        config(f"{STOCK}{PAIR}".replace("model_stock", "modelstock")),
        "not-sayable",
        lambda call: call.change("modelstock", call.ticked()[0]),
    ),
    Row(
        "a method like no other",
        config(f"{STOCK}{PAIR}".replace("model_stock", "qqq")),
        "not-sayable",
        told("model_stock", "qqq", "model_stock"),
    ),
    Row(
        "a model that is merged twice",
        config(f"{STOCK}models: [{{model: {CHAT}}}, {{model: {CODE}}}, {{model: {CHAT}}}]\n"),
        "not-sayable",
        told("write it once", f", {{model: {CHAT}}}]", "]"),
    ),
    Row(
        "tasks without a base",
        config(f"merge_method: ties\nparameters: {{weight: 1}}\n{PAIR}"),
        "not-sayable",
        told("`base_model: PATH`", "merge_method", f"base_model: {BASE}\nmerge_method"),
    ),
    Row(
        "a slice without its base",
        config(slices(layers(CHAT, 0, 2), method=f"base_model: {BASE}\nmerge_method: slerp\nparameters: {{t: 0.5}}\n")),
        "not-sayable",
        told("add the layers of the base", "sources: [", f"sources: [{layers(BASE, 0, 2)}, "),
    ),
    Row(
        "too few models",
        config(f"{STOCK}models: [{{model: {CHAT}}}]\n"),
        "not-sayable",
        told("write 2", f"{{model: {CHAT}}}", f"{{model: {CHAT}}}, {{model: {CODE}}}"),
    ),
    Row(
        "another epsilon",
        config(f"merge_method: multislerp\nparameters: {{weight: 1, eps: 1e-3}}\n{PAIR}"),
        "not-sayable",
        told("remove it", ", eps: 1e-3", ""),
    ),
    Row(
        "a misspelt parameter of a merge",
        config(f"merge_method: linear\nparameters: {{wieght: 1}}\n{PAIR}"),
        "not-sayable",
        lambda call: call.change("wieght", call.ticked()[0]),
    ),
    Row(
        "a weight that nobody says",
        config(f"merge_method: linear\n{PAIR}"),
        "not-sayable",
        told("`weight: NUMBER`", "merge_method: linear", "merge_method: linear\nparameters: {weight: 1}"),
    ),
    Row(
        "a flag that differs",
        config(f"merge_method: linear\nparameters: {{weight: 1, normalize: [true, false]}}\n{PAIR}"),
        "not-sayable",
        told("`normalize: true`", "[true, false]", "true"),
    ),
    Row(
        "two results",
        config(f"{STOCK}{PAIR}---\n{STOCK}{PAIR}"),
        "not-sayable",
        told("a file for each", f"---\n{STOCK}{PAIR}", ""),
    ),
    Row(
        "layers of a merge",
        config(TWO + slices(layers("middle", 0, 4), method="")),
        "not-sayable",
        told("name its directory", "model: middle", f"model: {CODE}"),
        then="not-sayable",
    ),
    Row(
        "a merge of layers in another one",
        config(
            f"name: middle\n{slices(layers(CHAT, 0, 2))}---\n{STOCK}models: [{{model: middle}}, {{model: {CODE}}}]\n"
        ),
        "not-sayable",
        told("name its directory", "model: middle", f"model: {CHAT}"),
        then="not-sayable",
    ),
    Row(
        "layers that are not there",
        config(slices(layers(CHAT, 0, 2), layers(CODE, 2, 9))),
        "not-sayable",
        lambda call: call.change("layer_range: [2, 9]", call.ticked()[0]),
    ),
    Row(
        "a slice of unequal parts",
        config(slices(UNEQUAL, method="merge_method: linear\nparameters: {weight: 1}\n")),
        "not-sayable",
        told("as many layers", "[0, 3]", "[0, 2]"),
    ),
    Row(
        "slices of two stacks of layers",
        config(slices(layers("$clip", 0, 1))),
        "not-sayable",
        told("with `models`", slices(layers("$clip", 0, 1)), "merge_method: passthrough\nmodels: [{model: $clip}]\n"),
    ),
    Row(
        "a mapping to begin a mapping with",
        raw("sources: {}\n", "init", "mapping.yaml"),
        "unknown-layout",
        told("name a checkpoint", "mapping.yaml", "$gqa"),
        then="ambiguous-conversion",
    ),
    Row(
        "a base beside a merge",
        raw(f"{STOCK}{PAIR}", "init", "mapping.yaml", "--to", "hf/llama"),
        "no-effect",
        lambda call: call.args.__delitem__(slice(2, 4)),
    ),
    Row(
        "a chat template of an unknown name",
        config(f"{STOCK}{PAIR}chat_template: chatmi\n"),
        "not-sayable",
        told("chatml", "chatmi", "chatml"),
    ),
    Row(
        "a tokenizer between merges",
        config(f"{TWO}{PAIR}tokenizer_source: base\n".replace(CHAT, "middle", 2)),
        "not-sayable",
        told("one by one", f"---\nbase_model: {BASE}\nmerge_method: linear\nparameters: {{weight: 1}}\n", ""),
        then="duplicate-key",
    ),
    Row(
        "a tokenizer of layers",
        config(slices(layers(CHAT, 0, 2)) + "tokenizer_source: base\n"),
        "not-sayable",
        told("leave it out", "tokenizer_source: base\n", ""),
    ),
    Row(
        "a token of a model that is not merged",
        config(union(f"tokens: {{a: {{source: {BASE}}}}}")),
        "not-sayable",
        told("name one of the models", f"source: {BASE}", f"source: {TOKENS}/chat"),
    ),
    Row(
        "a token that its model lacks",
        config(union(f'tokens: {{"<|tab|>": {{source: {TOKENS}/chat}}}}')),
        "not-sayable",
        told("a model that has it", f"source: {TOKENS}/chat}}", f"source: {TOKENS}/code}}"),
    ),
    Row(
        "a tokenizer of another model",
        config(union("").replace("source: union", f"source: {TOKENS}/code")),
        "not-sayable",
        told("write `base`", f"source: {TOKENS}/code", "source: base"),
    ),
    Row(
        "a tokenizer with another key",
        config(union("sauce: x")),
        "not-sayable",
        told("write `source`", ", sauce: x", ""),
    ),
    Row(
        "a vocabulary padded to nothing",
        config(union("pad_to_multiple_of: 0")),
        "not-sayable",
        told("as 64", "pad_to_multiple_of: 0", "pad_to_multiple_of: 64"),
    ),
    Row(
        "a token that is a number",
        config(union("tokens: {a: 3}")),
        "not-sayable",
        told("`{source: MODEL}`", "a: 3", f"a: {{source: {TOKENS}/chat}}"),
    ),
    Row(
        "a token of an unknown kind",
        config(union("tokens: {a: {source: {kind: one}}}")),
        "not-sayable",
        told("`{source: {kind: zero}}`", "kind: one", "kind: zero"),
    ),
    Row(
        "a merge of tokenizers without one",
        config(f"{STOCK}{PAIR}tokenizer_source: union\n"),
        "no-tokenizer",
        told("leave `tokenizer` out", "tokenizer_source: union\n", ""),
    ),
]

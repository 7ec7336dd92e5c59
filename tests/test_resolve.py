"""Rules against catalogs made by hand: who gets what, and every way in which that can fail."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from shardmerge.dtypes import DTYPES
from shardmerge.errors import ShardmergeError
from shardmerge.mapping.dropping import find_dropped
from shardmerge.mapping.pattern import Template
from shardmerge.mapping.preset_files import load_preset, with_preset
from shardmerge.mapping.reader import parse_spec
from shardmerge.mapping.resolution import Shadowed
from shardmerge.mapping.resolve import Resolution, resolve
from shardmerge.mapping.suggest import drop_lines
from shardmerge.targets.expectation import Component, Expectation, Resize
from shardmerge.tensors import Catalog, Shape, TensorEntry
from tests.counting import calls

START = "shardmerge: 1\nsources: {a: x, b: {path: y, required: false}}\n"  # what follows begins on line 3


def catalog(
    *names: str, aliases: dict[str, str] | None = None, absent: tuple[str, ...] = (), **shapes: Shape
) -> Catalog:
    """A catalog of tensors of shape (1,), or of the shapes said."""
    every = dict.fromkeys(names, (1,)) | shapes
    entries = {name: TensorEntry(name, DTYPES["F32"], shape, ()) for name, shape in every.items()}
    return Catalog("/models/x", "test", entries, aliases or {}, absent=frozenset(absent))


def run(text: str, catalogs: dict[str, Catalog], expectation: Expectation | None = None) -> Resolution:
    spec = parse_spec(START + text, "m.yaml")
    return resolve(spec.rules, find_dropped(spec.drops, catalogs), catalogs, expectation, user_file="m.yaml")


def taken(resolution: Resolution) -> dict[str, str]:
    return {target: f"{a.source}:{a.name}" for target, a in resolution.assignments.items()}


def problems(text: str, catalogs: dict[str, Catalog], expectation: Expectation | None = None) -> list[ShardmergeError]:
    with pytest.raises(ShardmergeError) as caught:
        run(text, catalogs, expectation)
    return list(caught.value.each())


def only(text: str, catalogs: dict[str, Catalog], expectation: Expectation | None = None) -> ShardmergeError:
    found = problems(text, catalogs, expectation)
    assert len(found) == 1, [str(one) for one in found]
    return found[0]


# --- who gets what ---


def test_the_first_candidate_that_has_a_tensor_wins():
    text = 'tensors:\n  t.{r...}: ["a:m.{r...}", "b:{r...}"]\n'
    found = run(text, {"a": catalog("m.x.w"), "b": catalog("x.w", "y.w")})
    assert taken(found) == {"t.x.w": "a:m.x.w", "t.y.w": "b:y.w"}
    assert found.shadowed == (Shadowed("b", "x.w", "t.x.w"),)
    assert found.dropped == ()
    assert found.assignments["t.x.w"].target == "t.x.w"
    assert str(found.assignments["t.x.w"].rule.mark) == "m.yaml:4:3"


def test_drops_go_before_rules():
    text = "tensors:\n  t.{r...}: a:{r...}\ndrop:\n  - a:{r...}.inv_freq\n"
    found = run(text, {"a": catalog("x.w", "x.inv_freq")})
    assert taken(found) == {"t.x.w": "a:x.w"}
    assert found.dropped == (("a", "x.inv_freq"),)


def test_aliases_are_names_too():
    text = "tensors:\n  head: a:lm_head\n  embed: a:embed\n"
    found = run(text, {"a": catalog("embed", aliases={"lm_head": "embed"})})
    assert taken(found) == {"head": "a:lm_head", "embed": "a:embed"}


def test_a_tensor_may_feed_two_targets_and_is_then_not_shadowed():
    text = "tensors:\n  head: a:embed\n  t.{x}: [b:{x}, a:{x}]\n".replace("[b:{x}, a:{x}]", '["b:{x}", "a:{x}"]')
    found = run(text, {"a": catalog("embed"), "b": catalog("embed")})
    assert taken(found) == {"head": "a:embed", "t.embed": "b:embed"}
    assert found.shadowed == ()


def test_the_target_may_narrow_a_capture():
    text = "tensors:\n  t.{i:int}: a:{i}\ndrop:\n  - a:last\n"
    assert taken(run(text, {"a": catalog("1", "22", "last")})) == {"t.1": "a:1", "t.22": "a:22"}
    error = only("tensors:\n  t.{i:int}: a:{i}\n", {"a": catalog("1", "22", "last")})
    assert error.code == "unmatched-source"


def test_an_optional_source_that_is_not_there_holds_nothing():
    text = 'tensors:\n  t.{x}: ["b:{x}", "a:{x}"]\n  u: b:u\ndrop:\n  - b:v\n'
    assert taken(run(text, {"a": catalog("w")})) == {"t.w": "a:w"}


def test_placeholders_do_not_count_where_elements_are_wanted():
    text = 'tensors:\n  t.{x}: ["a:{x}", "b:{x}"]\n'
    sources = {"a": catalog(w=(0,), e=(0, 4)), "b": catalog(w=(2,))}
    found = run(text, sources, Expectation({"t.w": (2,), "t.e": (0, 4)}))
    assert taken(found) == {"t.w": "b:w", "t.e": "a:e"}


def test_names_listed_without_data_are_not_there():
    text = 'tensors:\n  t.{x}: ["a:{x}", "b:{x}"]\n'
    found = run(text, {"a": catalog("v", absent=("w",)), "b": catalog("w")})
    assert taken(found) == {"t.v": "a:v", "t.w": "b:w"}


def test_tied_names_are_dropped():
    expectation = Expectation({"embed": (1,)}, tied={"head": "embed"})
    found = run("tensors:\n  '{x}': a:{x}\n", {"a": catalog("embed", "head")}, expectation)
    assert taken(found) == {"embed": "a:embed"}
    assert found.dropped == (("a", "head"),)


@pytest.mark.parametrize(
    ("shape", "wanted", "grown", "fits"),
    [
        ((4, 2), (4, 2), False, True),
        ((4, 2), (6, 2), True, True),
        ((4, 2), (6, 2), False, False),
        ((6, 2), (4, 2), True, False),
        ((4, 3), (6, 2), True, False),
        ((4,), (6, 2), True, False),
        ((), (), False, True),
        ((), (1,), True, False),
        ((8,), (4, 2), False, False),
    ],
)
def test_shapes(shape, wanted, grown, fits):
    expectation = Expectation({"w": wanted}, resized={"w": Resize()} if grown else {})
    if fits:
        assert taken(run("tensors:\n  w: a:w\n", {"a": catalog(w=shape)}, expectation)) == {"w": "a:w"}
        return
    error = only("tensors:\n  w: a:w\n", {"a": catalog(w=shape)}, expectation)
    assert (error.code, error.where) == ("shape-mismatch", "m.yaml:4:3")
    assert (error.found, error.expected) == (f"{list(shape)} in a:w", str(list(wanted)))


# --- what can be wrong ---


def test_two_rules_that_claim_one_target_are_told_once():
    text = 'tensors:\n  "t.{i}.{k:v|w}": "a:{i}.{k:v|w}"\n  "t.{i:int}.{p}": "b:{i:int}.{p}"\n'
    names = [f"{i}.w" for i in range(8)]
    error = only(text, {"a": catalog(*names), "b": catalog(*names)})
    assert (error.code, error.where) == ("double-claim", "m.yaml:5:3")
    assert "t.0.w, t.1.w, t.2.w, t.3.w, t.4.w and 3 more" in error.what
    assert "a:0.w by `t.{i}.{k:v|w}` at m.yaml:4:3" in error.found
    assert "b:0.w by `t.{i:int}.{p}`" in error.found


def test_one_rule_that_makes_a_name_twice():
    text = 'tensors:\n  "{x}0{y:a|0a}": "a:{x}.{y}"\n'
    assert taken(run(text, {"a": catalog("1.0a", "2.a")})) == {"100a": "a:1.0a", "20a": "a:2.a"}
    error = only(text, {"a": catalog("1.0a", "10.a")})
    assert (error.code, error.where) == ("double-claim", "m.yaml:4:3")
    assert "one rule makes the same target name twice: 100a" in error.what


def test_a_rule_without_a_match_names_the_nearest():
    text = "tensors:\n  t: a:model.embed_token.weight\n  u: a:model.embed_tokens.weight\n"
    error = only(text, {"a": catalog("model.embed_tokens.weight")})
    assert (error.code, error.where) == ("rule-matches-nothing", "m.yaml:4:3")
    assert "a:model.embed_tokens.weight" in error.hint


def test_a_rule_without_a_match_is_silent_where_its_targets_are_missing():
    text = "tensors:\n  t.{r...}: a:t.{r...}\n  u: a:u\n  v.{r...}: a:v.{r...}\n"
    found = problems(text, {"a": catalog("u")}, Expectation({"t.w": (1,), "u": (1,)}))
    assert [(error.code, error.where) for error in found] == [
        ("missing-tensor", "m.yaml"),
        ("rule-matches-nothing", "m.yaml:6:3"),
    ]
    assert found[0].expected == "a:t.w"


def test_a_drop_of_the_user_must_match():
    text = "tensors:\n  t: a:t\ndrop:\n  - a:inv_frq\n"
    error = only(text, {"a": catalog("t")})
    assert (error.code, error.where) == ("drop-matches-nothing", "m.yaml:6:5")


def test_tensors_that_nothing_takes_come_with_lines_to_paste():
    names = [f"text_model.layers.{i}.w" for i in range(7)]
    error = only("tensors:\n  t.{x}: a:{x}\n", {"a": catalog("w", *names, "scale.logit")})
    assert (error.code, error.where) == ("unmatched-source", "m.yaml")
    assert "8 tensors of a" in error.what
    assert "and 3 more" in error.what
    assert "`- a:text_model.layers.{rest...}` and `- a:scale.logit`" in error.hint


DROPS = [
    # names left over, names used, templates
    (["t.a.w", "t.b.w"], [], ["t.{rest...}"]),
    (["t.a.x", "t.a.y.z"], ["t.b.w"], ["t.a.{rest...}"]),
    (["h.0.bias", "h.1.bias"], ["h.0.w", "h.1.w"], ["h.{a}.bias"]),
    (["h.0.inv", "h.0.x.inv"], ["h.0.w"], ["{rest...}.inv"]),
    (["h.0", "h.1.b"], ["h.1.w", "h.2", "g.b"], ["h.0", "h.1.b"]),
    (["t", "t.a"], [], ["t", "t.a"]),
    (["a{b}.c"], [], ["a{{b}}.c"]),
    (["x.1", "y.1", "z.1", "q.1"], [], ["x.1", "y.1", "z.1"]),
]


@pytest.mark.parametrize(("names", "used", "templates"), DROPS)
def test_lines_to_paste_cover_what_is_left_and_nothing_that_is_used(names, used, templates):
    assert drop_lines("s", names, used) == [f"- s:{template}" for template in templates]
    assert not any(Template.parse(template).match(name) for template in templates for name in used)


@pytest.mark.parametrize("name", ["a: b", "a #b", "a:", "a\nb", "é: x"])
def test_a_line_to_paste_is_yaml_that_says_the_name(name):
    line = drop_lines("a", [name], [])[0]
    spec = parse_spec(START + f"tensors:\n  t: b:t\ndrop:\n  {line}\n", "m.yaml")
    assert spec.drops[0].template.match(name) == {}


def test_missing_tensors_say_where_they_were_looked_for():
    text = 'tensors:\n  t.{r...}: ["a:m.{r...}", "b:{r...}"]\n'
    expectation = Expectation({f"t.{i}.weight": (1,) for i in range(9)})
    error = only(text, {"a": catalog("m.0.weight"), "b": catalog("1.weight")}, expectation)
    assert (error.code, error.where) == ("missing-tensor", "m.yaml")
    assert "7 tensors of the target without a source: t.2.weight" in error.what
    assert "and 2 more" in error.what
    assert error.expected == "a:m.2.weight or b:2.weight"
    assert "m.0.weight" in error.hint


def test_missing_tensors_that_are_only_placeholders():
    error = only("tensors:\n  w: a:w\n", {"a": catalog(w=(0,))}, Expectation({"w": (3,)}))
    assert (error.code, error.found) == ("missing-tensor", "placeholders without data: a:w")


VISION = Component("v.", "it was trained frozen", "Add `vision: some/clip`")


def test_a_whole_component_that_is_missing_is_one_error_with_its_remedy():
    expectation = Expectation({"w": (1,), "v.a": (1,), "v.b": (1,)}, components=(VISION,))
    error = only("tensors:\n  w: a:w\n  v.{x}: b:{x}\n", {"a": catalog("w"), "b": catalog()}, expectation)
    assert error.what == "2 tensors of v.* have no source: it was trained frozen"
    assert (error.code, error.where, error.hint) == ("missing-component", "m.yaml", "Add `vision: some/clip`")


def test_a_component_that_is_there_in_part_is_missing_tensors():
    expectation = Expectation({"w": (1,), "v.a": (1,), "v.b": (1,)}, components=(VISION,))
    error = only("tensors:\n  w: a:w\n  v.{x}: b:{x}\n", {"a": catalog("w"), "b": catalog("a")}, expectation)
    assert (error.code, error.expected) == ("missing-tensor", "b:b")


def test_targets_that_nobody_expects_are_told_by_rule_and_source():
    text = 'tensors:\n  t.{r...}: ["a:m.{r...}", "b:{r...}"]\n  u: a:u\n'
    sources = {"a": catalog("m.weight", "m.wieght", "u"), "b": catalog("bias", "scale.x")}
    found = problems(text, sources, Expectation({"t.weight": (1,)}))
    assert [(error.code, error.where, error.found) for error in found] == [
        ("unexpected-target", "m.yaml:4:3", "a:m.wieght"),
        ("unexpected-target", "m.yaml:4:3", "b:bias"),
        ("unexpected-target", "m.yaml:5:3", "a:u"),
    ]
    assert found[0].expected == "names such as t.weight"
    assert found[0].hint == "if not wanted, add under `drop:` `- a:m.wieght`"
    assert found[1].hint == "if not wanted, add under `drop:` `- b:bias` and `- b:scale.x`"


def test_shapes_of_another_model_are_one_error_for_each_source():
    names = [f"l{i}" for i in range(7)]
    sources = {"a": catalog(**dict.fromkeys(names, (2, 2))), "b": catalog(z=(3,))}
    expectation = Expectation(dict.fromkeys([f"t.{name}" for name in names], (4, 4)) | {"z": (1,)})
    of_a, of_b = problems("tensors:\n  t.{x}: a:{x}\n  z: b:z\n", sources, expectation)
    assert (of_a.code, of_a.where) == ("shape-mismatch", "m.yaml:4:3")
    assert "7 tensors of a" in of_a.what
    assert of_a.found == "[2, 2] in a:l0, [2, 2] in a:l1, [2, 2] in a:l2, [2, 2] in a:l3, [2, 2] in a:l4 and 2 more"
    assert "another size" in of_a.hint
    assert (of_b.code, of_b.where, of_b.found) == ("shape-mismatch", "m.yaml:5:3", "[3] in b:z")


ADAPTERS = [
    "m.q.lora_A.default.weight",
    "m.q.lora_B.default.weight",
    "m.e.lora_embedding_A.default",
    "m.q.lora_magnitude_vector.default",
    "m.head.modules_to_save.default.weight",
    "m.q.base_layer.weight",
]


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("rule", ["t.{r...}: a:m.{r...}", "t.{x}: a:m.{x}"])
def test_adapters_are_named_as_such(name, rule):
    error = only(f"tensors:\n  {rule}\n", {"a": catalog("m.w", name)}, Expectation({"t.w": (1,)}))
    assert error.code == "unmerged-adapter"
    assert name in error.what
    assert "merge" in error.hint


def test_without_a_target_adapters_are_tensors_like_others():
    found = run("tensors:\n  t.{r...}: a:m.{r...}\n", {"a": catalog(*ADAPTERS)})
    assert len(found.assignments) == len(ADAPTERS)


def test_all_problems_are_told_together():
    text = "tensors:\n  w: a:w\n  x: a:x\n  q: a:q\n  z: a:zz\ndrop:\n  - a:nothing\n"
    expectation = Expectation({"w": (2,), "x": (1,), "y": (1,)})
    found = problems(text, {"a": catalog("w", "x", "q", "left")}, expectation)
    assert [error.code for error in found] == [
        "drop-matches-nothing",
        "missing-tensor",
        "unexpected-target",
        "shape-mismatch",
        "rule-matches-nothing",
        "unmatched-source",
    ]


def test_nothing_at_all_is_an_error():
    assert only("tensors:\n  t: b:t\n", {}).code == "nothing-matched"


# --- the XTuner preset ---

LLAMA = [
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.input_layernorm.weight",
    "model.norm.weight",
    "lm_head.weight",
]
CLIP = [
    "embeddings.class_embedding",
    "embeddings.patch_embedding.weight",
    "pre_layrnorm.weight",
    "encoder.layers.0.self_attn.q_proj.bias",
    "post_layernorm.bias",
]
PROJECTOR = [f"projector.model.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")]

EXPECTED = Expectation(
    dict.fromkeys(
        [
            *(f"language_model.{name}" for name in LLAMA),
            *(f"vision_tower.vision_model.{name}" for name in CLIP),
            *(f"multi_modal_projector.linear_{n}.{p}" for n in (1, 2) for p in ("weight", "bias")),
        ],
        (1,),
    ),
    components=(Component("vision_tower.", "the visual encoder was frozen", "Add `vision: <clip>`"),),
)


def convert(**catalogs: Catalog) -> Resolution:
    sources = ", ".join(f"{name}: x" for name in catalogs)
    spec = parse_spec(f"shardmerge: 1\nsources: {{{sources}}}\nuse: xtuner/llava-to-hf\n", "m.yaml")
    spec = with_preset(spec, load_preset(spec.use))
    return resolve(spec.rules, find_dropped(spec.drops, catalogs), catalogs, EXPECTED, user_file="m.yaml")


def _vision_base(prefix: str = "vision_model.") -> Catalog:
    return catalog(
        *(prefix + name for name in CLIP),
        f"{prefix}embeddings.position_ids",
        "text_model.embeddings.token_embedding.weight",
        "text_model.encoder.layers.0.self_attn.q_proj.weight",
        "text_projection.weight",
        "visual_projection.weight",
        "logit_scale",
    )


def test_frozen_parts_come_from_the_bases():
    found = convert(trained=catalog(*PROJECTOR), llm=catalog(*LLAMA), vision=_vision_base())
    assert taken(found) == {
        **{f"language_model.{name}": f"llm:{name}" for name in LLAMA},
        **{f"vision_tower.vision_model.{name}": f"vision:vision_model.{name}" for name in CLIP},
        "multi_modal_projector.linear_1.weight": "trained:projector.model.0.weight",
        "multi_modal_projector.linear_1.bias": "trained:projector.model.0.bias",
        "multi_modal_projector.linear_2.weight": "trained:projector.model.2.weight",
        "multi_modal_projector.linear_2.bias": "trained:projector.model.2.bias",
    }
    assert found.shadowed == ()
    assert {name for _, name in found.dropped} == {
        "vision_model.embeddings.position_ids",
        "text_model.embeddings.token_embedding.weight",
        "text_model.encoder.layers.0.self_attn.q_proj.weight",
        "text_projection.weight",
        "visual_projection.weight",
        "logit_scale",
    }


@pytest.mark.parametrize("level", ["vision_model.", ""])
@pytest.mark.parametrize("base_level", ["vision_model.", ""])
def test_what_was_trained_wins_whatever_transformers_wrote(level, base_level):
    trained = catalog(
        *(f"llm.{name}" for name in LLAMA),
        *(f"visual_encoder.{level}{name}" for name in CLIP),
        "llm.model.layers.0.self_attn.rotary_emb.inv_freq",
        *PROJECTOR,
    )
    found = convert(trained=trained, llm=catalog(*LLAMA), vision=_vision_base(base_level))
    assert set(found.assignments) == set(EXPECTED.tensors)
    assert {assignment.source for assignment in found.assignments.values()} == {"trained"}
    assert {(one.source, one.target) for one in found.shadowed} == {
        *(("llm", f"language_model.{name}") for name in LLAMA),
        *(("vision", f"vision_tower.vision_model.{name}") for name in CLIP),
    }
    assert ("trained", "llm.model.layers.0.self_attn.rotary_emb.inv_freq") in found.dropped


def test_a_partly_trained_tower_is_filled_from_the_base():
    trained = catalog("visual_encoder.vision_model.post_layernorm.bias", *PROJECTOR)
    found = taken(convert(trained=trained, llm=catalog(*LLAMA), vision=_vision_base()))
    assert found["vision_tower.vision_model.post_layernorm.bias"].startswith("trained:")
    assert found["vision_tower.vision_model.pre_layrnorm.weight"].startswith("vision:")


def failures(**catalogs: Catalog) -> list[ShardmergeError]:
    with pytest.raises(ShardmergeError) as caught:
        convert(**catalogs)
    return list(caught.value.each())


def test_a_frozen_tower_without_a_base_is_one_error_with_the_remedy():
    (error,) = failures(trained=catalog(*(f"llm.{name}" for name in LLAMA), *PROJECTOR), llm=catalog(*LLAMA))
    assert (error.code, error.hint) == ("missing-component", "Add `vision: <clip>`")
    assert error.what == "5 tensors of vision_tower.* have no source: the visual encoder was frozen"


def test_a_projector_of_three_layers_has_no_place():
    trained = catalog(*PROJECTOR, "projector.model.4.weight", "projector.model.4.bias")
    (error,) = failures(trained=trained, llm=catalog(*LLAMA), vision=_vision_base())
    assert error.code == "unmatched-source"
    assert "projector.model.4.weight" in error.what
    assert "`- trained:projector.model.4.{rest...}`" in error.hint


def test_an_adapter_is_not_silently_left_out():
    trained = catalog(
        *PROJECTOR,
        "llm.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "visual_encoder.base_model.model.vision_model.encoder.layers.0.mlp.fc1.lora_B.default.weight",
    )
    (error,) = failures(trained=trained, llm=catalog(*LLAMA), vision=_vision_base())
    assert error.code == "unmerged-adapter"
    assert "2 adapter tensors" in error.what


# --- size ---


def experts(layers: int) -> dict[str, Catalog]:
    """Nine hundred experts' tensors a layer, as in the largest models."""
    names = {f"m.layers.{i}.e.{j}.w{k}": (1,) for i in range(layers) for j in range(300) for k in (1, 2, 3)}
    return {"a": catalog(*(f"x{n}" for n in range(7)), **names)}


def is_linear(work: Callable[[dict[str, Catalog]], object]) -> bool:
    """Tells whether three times as many tensors take about three times the calls."""
    small, large = (calls(partial(work, experts(layers))) for layers in (4, 12))
    return large < 3.3 * small


def test_ninety_thousand_tensors_and_ten_rules():
    rules = "".join(f"  t.{k}.{{i:int}}.{{j}}: a:m.layers.{{i:int}}.e.{{j}}.w{k}\n" for k in (1, 2, 3))
    rules += "".join(f"  x{n}: a:x{n}\n" for n in range(7))
    found = run("tensors:\n" + rules, experts(101))
    assert len(found.assignments) == 101 * 300 * 3 + 7
    assert is_linear(lambda some: run("tensors:\n" + rules, some))


def test_a_wrong_name_among_ninety_thousand_is_told():
    text = "tensors:\n  t.{r...}: a:m.layer.{r...}\n  u: a:m.layers.7.e.42.w4\n"
    found = problems(text, experts(101))
    assert is_linear(lambda some: problems(text, some))
    assert [error.code for error in found] == ["rule-matches-nothing", "rule-matches-nothing", "unmatched-source"]
    assert "a:m.layers.7.e.42.w" in found[1].hint

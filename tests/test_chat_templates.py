"""Chat templates that mergekit has by name render as its own do, and that of a configuration is the result's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import transformers
from jinja2.exceptions import TemplateError

import shardmerge
from shardmerge import api
from shardmerge.mergekit.chat_templates import CHAT_TEMPLATES
from tests.conftest import GOLDEN
from tests.load_environments import MERGEKIT, interpreter, ready

TALKS = {
    "a question": ["user  how? "],
    "an answer": ["user how?", "assistant like this\n"],
    "a system": ["system be kind ", "user how?", "assistant so", "user and then?"],
    "a system twice": ["system be kind", "user how?", "system be brief"],
    "a context": ["user_context the text", "user how?"],
    "two answers": ["user how?", "assistant so", "assistant or so"],
}


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(GOLDEN / "mergekit" / "tokens" / "base")


def rendered(tokenizer: transformers.PreTrainedTokenizerBase, template: str, talk: str, *, more: bool) -> str:
    """Returns the text of a talk; of one that the template refuses, that it does."""
    messages = [dict(zip(("role", "content"), one.split(" ", 1), strict=True)) for one in TALKS[talk]]
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=more
        )
    except TemplateError:
        return "refused"


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_template_renders_as_that_of_mergekit(
    name: str, talk: str, tokenizer: transformers.PreTrainedTokenizerBase
) -> None:
    if not ready(MERGEKIT, "mergekit"):
        pytest.skip(f"mergekit {MERGEKIT} could not be installed: `python tests/load_environments.py` says why")
    (folder,) = interpreter(MERGEKIT, "mergekit").parent.parent.glob(
        "lib/*/site-packages/mergekit/_data/chat_templates"
    )
    assert {path.stem for path in folder.glob("*.jinja")} == CHAT_TEMPLATES.keys()
    theirs = (folder / f"{name}.jinja").read_text("utf-8")
    for more in (False, True):
        wanted = rendered(tokenizer, theirs, talk, more=more)
        assert rendered(tokenizer, CHAT_TEMPLATES[name], talk, more=more) == wanted


OWN = "{# \"quoted\" \\ back #}{% for m in messages %}\n{{ m.role ~ ':\\n' }}\té{% endfor %}"


@pytest.mark.parametrize(
    ("stated", "wanted"), [("chatml", CHAT_TEMPLATES["chatml"]), ("|\n  " + OWN.replace("\n", "\n  "), OWN)]
)
@pytest.mark.parametrize("union", ["", "tokenizer_source: union\n"])
def test_a_template_is_that_of_the_result(stated: str, wanted: str, union: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "mergekit" / "tokens", tmp_path / "tokens")
    (tmp_path / "tokens" / "chat" / "chat_template.jinja").write_text("the donor's own", "utf-8")
    models = "".join(f"  - model: {tmp_path}/tokens/{name}\n" for name in ("chat", "code"))
    if not union:  # rows as they are need models of one size
        models = f"  - model: {tmp_path}/tokens/chat\n"
    method = "merge_method: linear\nparameters: {weight: 1}\n"
    (tmp_path / "m.yml").write_text(f"{method}models:\n{models}{union}chat_template: {stated}\n", "utf-8")
    text = api.init(tmp_path / "m.yml", mapping=tmp_path / "m.yaml").text
    (tmp_path / "m.yaml").write_text(text, "utf-8")
    out = shardmerge.run(tmp_path / "m.yaml", options=shardmerge.Options(sync=False)).path
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template.strip() == wanted.strip()

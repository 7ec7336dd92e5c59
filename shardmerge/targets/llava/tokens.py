"""The tokens that a Hugging Face LLaVA needs: ``<image>``, and one for padding or for videos."""

from __future__ import annotations

from collections.abc import Mapping

from shardmerge.errors import TargetError
from shardmerge.targets import tokenizer
from shardmerge.targets.config_numbers import is_whole
from shardmerge.targets.expectation import Request
from shardmerge.targets.llava.bases import TextBase
from shardmerge.targets.llava.kinds import IMAGE_TOKEN, PAD_TOKEN, VIDEO_TOKEN, LlavaKind
from shardmerge.targets.options import choice
from shardmerge.targets.tokenizer import TokenizerFiles
from shardmerge.targets.vocabulary import check_ids
from shardmerge.tensors import Extent

# What LlavaOnevisionConfig has where a config does not say it.
_VIDEO_ID = 151647


def llava_tokens(
    request: Request, text: TextBase, side_files: Mapping[str, Extent], kind: LlavaKind
) -> tuple[TokenizerFiles, int | None]:
    """Returns the tokenizer with the tokens a LLaVA needs, after those that the mapping asks for; and the pad's id.

    Parameters
    ----------
    text
        The language model, whose rows and class of tokenizer count.
    side_files
        Among which the tokenizer's are.
    kind
        Of the LLaVA.

    Raises
    ------
    TargetError
        ``bad-option``, ``token-id``, or what the tokenizer's files raise.
    """
    if choice(request, "vocabulary", ("extend", "keep")) == "keep":
        return _kept_tokens(request, text, side_files, kind)
    wanted = request.vocabulary
    pad = wanted.pad if wanted and wanted.pad else PAD_TOKEN if PAD_TOKEN in kind.tokens else ""
    asked = wanted.tokens if wanted else ()
    own = (token for token in kind.tokens if token != PAD_TOKEN)
    needed = [token for token in (*own, pad) if token and token not in asked]
    files = tokenizer.add_tokens(
        side_files,
        request.read,
        (*asked, *needed),
        pad_token=pad,
        vocab_size=text.architecture.vocab_size,
        default_class=text.architecture.tokenizer_class,
        processor_class=kind.processor_class,
    )
    stated = text.config.get("pad_token_id")
    return files, files.ids[pad] if pad else stated if isinstance(stated, int) else None


def _kept_tokens(
    request: Request, text: TextBase, side_files: Mapping[str, Extent], kind: LlavaKind
) -> tuple[TokenizerFiles, int | None]:
    """Returns the tokenizer of a LLaVA as it is, with the ids that its config.json states."""
    image = text.whole.get("image_token_index", text.whole.get("image_token_id"))
    pad = text.whole.get("pad_token_id", text.config.get("pad_token_id"))
    if not is_whole(image):
        raise TargetError(
            "bad-option",
            "`vocabulary: keep` needs a text source that is a Hugging Face LLaVA",
            where=request.where,
            found=f"no image_token_index in {text.where}",
            expected="`image_token_index` in its config.json",
            hint="write `vocabulary: extend` in the target",
        )
    known = tokenizer.token_id(side_files, request.read, IMAGE_TOKEN)
    if request.vocabulary is None:
        check_ids({IMAGE_TOKEN: image}, text.architecture.vocab_size, text.where)
    if known not in (None, image):
        raise TargetError(
            "token-id",
            f"config.json and the tokenizer do not agree on the id of `{IMAGE_TOKEN}`",
            where=text.where,
            found=f"image_token_index {image}",
            expected=f"{known}, as the tokenizer has it",
        )
    ids = {IMAGE_TOKEN: image}
    if VIDEO_TOKEN in kind.tokens:
        video = text.whole.get("video_token_index", text.whole.get("video_token_id"))
        ids[VIDEO_TOKEN] = video if isinstance(video, int) else _VIDEO_ID
    files = TokenizerFiles(ids, tokenizer.copies(side_files))
    return files, pad if isinstance(pad, int) else None

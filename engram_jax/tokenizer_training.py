"""Trains SentencePiece models that `engram_jax.tokenizer` reads.

    python -m engram_jax.tokenizer_training OUT.model --sources NAME_OR_PATH …

The shipped model (`default`) is the output of this command:

    python -m engram_jax.tokenizer_training default.model --vocab-size 8192
        --sources vital_en austen factbook web_bible wordnet --shares 1 1 0.25 0.3 0.15

65 % of its training bytes were prose (`vital_en`, `austen`). Bytes per token over each complete
corpus: vital_en 3.960, austen 4.193, factbook 3.790, web_bible 3.901, wordnet 3.505.
"""

import io
import re
import sys

from engram_jax.beginning import begin

if __name__ == "__main__":
    begin(caches=False)

from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece
from tqdm import tqdm

from engram_jax.command_line import run_function
from engram_jax.data.documents import read_documents
from engram_jax.errors import InputError
from engram_jax.files import atomic_write
from engram_jax.tokenizer import checked_text
from engram_jax.tokenizer_sentencepiece import SentencePieceTokenizer


def train_tokenizer(texts: Sequence[str], vocab_size: int = 8192) -> bytes:
    """Train a SentencePiece BPE model on texts, and return the content of its file.

    Ids are: 0 pad, 1 bos, 2 eos, 3 unknown, 4–259 bytes. The model is lossless: it does not
    normalize, and characters without a piece are encoded as bytes. Numbers are not split into
    digits. On the shipped corpora that saves 2 % of the tokens of `vital_en`, and 22 % of those of
    `factbook`, which has many dates and amounts. The same texts in the same order give the same
    file.

    Raises:
        InputError: there is no text, or the size is too large for the texts, or too small for their
            characters.
    """
    _check_vocab_size(vocab_size)
    if not any(texts):
        raise InputError("the sources hold no text to train a tokenizer on; choose other sources.")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            # SentencePiece reserves U+2585, and skips any document that contains it.
            sentence_iterator=(checked_text(text).replace("\u2585", "\n") for text in texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=False,
            max_sentence_length=2**30,  # bytes; the default drops documents above 4,192
            minloglevel=2,
        )
    except RuntimeError as error:
        if limit := re.search(r"to a value <= (\d+)", str(error)):
            raise InputError(
                f"these sources give at most {limit[1]} pieces, not {vocab_size}; lower "
                "--vocab-size or use more text."
            ) from error
        if limit := re.search(r"required_chars. \d+ vs (\d+)", str(error)):
            raise InputError(
                f"a vocabulary of {vocab_size} cannot hold the bytes and characters of these "
                f"sources; raise --vocab-size to at least {limit[1]}."
            ) from error
        raise
    return model.getvalue()


def train(
    out: Path,
    /,
    sources: tuple[str, ...],
    shares: tuple[float, ...] = (),
    vocab_size: int = 8192,
) -> None:
    """Train a SentencePiece BPE model with byte fallback, and print its bytes per token.

    Args:
        out: file to write, named *.model; it must not exist.
        sources: names of shipped corpora (such as vital_en) or paths of the training text.
        shares: share of each source to use, in the order of the sources: 0.25 takes every fourth
            document. By default, all of every source.
        vocab_size: number of pieces, including 4 special and 256 byte pieces.
    """
    if out.suffix != ".model":
        raise InputError(f"output {out} must end in .model; rename it.")
    if out.exists():
        raise InputError(f"{out} exists; remove it or choose another file.")
    if not out.parent.is_dir():
        raise InputError(f"folder {out.parent} does not exist; create it first.")
    shares = shares or (1.0,) * len(sources)
    if len(shares) != len(sources) or not all(0 < share <= 1 for share in shares):
        raise InputError(
            f"--shares {' '.join(map(str, shares))} is invalid; give one number above 0 and up to "
            f"1 for each of the {len(sources)} sources."
        )

    _check_vocab_size(vocab_size)  # also here, before the sources are read
    corpora = []
    for source in sources:
        documents = tqdm(read_documents(source), f"reading {source}", unit=" documents")
        corpora.append([document.text for document in documents])
        if not any(corpora[-1]):
            raise InputError(f"source {source} holds no text; remove or replace it.")
    used = [list(_spread(texts, share)) for texts, share in zip(corpora, shares, strict=True)]
    used_bytes = [sum(len(text.encode()) for text in texts) for texts in used]
    print(f"learning {vocab_size} pieces from {sum(used_bytes):,} bytes …", file=sys.stderr)
    model = train_tokenizer([text for texts in used for text in texts], vocab_size)
    _write(out, model)

    tokenizer = SentencePieceTokenizer(model, out.name)
    for source, texts, count in zip(sources, corpora, used_bytes, strict=True):
        size = sum(len(text.encode()) for text in texts)
        tokens = sum(map(len, tokenizer.encode_batch(texts)))
        print(
            f"{source}: {size / tokens:.3f} bytes per token "
            f"({len(texts):,} documents; {count:,} of {size:,} bytes trained on)"
        )
    print(f"wrote {out} ({tokenizer.fingerprint})")


def _check_vocab_size(vocab_size: int) -> None:
    if vocab_size >= 2**31:
        raise InputError(f"--vocab-size is {vocab_size}; at most {2**31 - 1:,} is possible.")
    if vocab_size <= 260:
        raise InputError(
            f"a vocabulary of {vocab_size} has no room for pieces beyond 4 special and 256 byte "
            "pieces; raise --vocab-size (the shipped model has 8192)."
        )


def _spread(texts: Sequence[str], share: float) -> Iterator[str]:
    """Yield a share of the documents, evenly spaced."""
    return (t for i, t in enumerate(texts) if int((i + 1) * share) > int(i * share))


def _write(out: Path, content: bytes) -> None:
    try:
        with atomic_write(out) as partial:
            partial.write_bytes(content)
    except OSError as error:
        raise InputError(f"cannot write {out} ({error.strerror}); choose another path.") from error


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line. Invalid input ends it with a one-sentence message and status 2."""
    run_function(train, args, prog="python -m engram_jax.tokenizer_training")


if __name__ == "__main__":
    main()

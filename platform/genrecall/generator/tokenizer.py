"""The text vocabulary of the generator: a byte-level BPE learned from catalogue and training queries, plus the prompt's markers.

Source: byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) through the `tokenizers` library. Text is NFKC-normalised
and lower-cased, whitespace collapses, digits never share a token with letters, and every byte has a token, so no text is
unknown. Shoppers' genders and age bands become one special token each, found in the training data.

A special token is never read from user text: a query that spells `[ANSWER]` is encoded as ordinary characters.
Shapes: n texts; a ragged batch of token ids is flat int32 [T] beside offsets int64 [n + 1].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

MARKERS = ("[PAD]", "[UNK]", "[ITEM]", "[QUERY]", "[USER]", "[HISTORY]", "[ANSWER]")
MAX_PROFILE_VALUES = 32
"""At most so many genders, and so many age bands, get a token; the most frequent ones win."""

_CHARACTERS_PER_TOKEN = 16
"""A text is cut to this many characters per token of the limit before it is encoded: keeps a 10,000-character query cheap."""


_UNFOLDED, _FOLDED = " Ａngle\tBRACKET", "angle bracket"


class TokenizerError(ValueError):
    """A tokenizer that cannot be trained or read."""


class QueryTokenizer:
    """Texts to token ids and the ids of the prompt's markers.

    Args:
        tokenizer: a `tokenizers.Tokenizer` that holds every marker of `MARKERS` as a special token.

    Raises:
        TokenizerError: a marker is missing.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        ids = {marker: tokenizer.token_to_id(marker) for marker in MARKERS}
        missing = [marker for marker, identity in ids.items() if identity is None]
        if missing:
            raise TokenizerError(f"tokenizer: expected the special tokens {', '.join(MARKERS)}, missing {', '.join(missing)}; rerun jobs/train_generator.py")
        self._tokenizer = tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True  # "[ANSWER]" typed by a shopper is text
        self.pad_id, self.item_id, self.query_id, self.user_id, self.history_id, self.answer_id = (
            identity for marker, identity in ids.items() if identity is not None and marker != "[UNK]"
        )
        special = {token.content: identity for identity, token in tokenizer.get_added_tokens_decoder().items()}
        self._genders = {name[8:-1]: identity for name, identity in special.items() if name.startswith("[GENDER=")}
        self._age_bands = {name[5:-1]: identity for name, identity in special.items() if name.startswith("[AGE=")}

    @property
    def vocab_size(self) -> int:
        """Number of text tokens, markers included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def tokens(self) -> list[str | None]:
        """The text tokens by id, as the vocabulary spells them; None for markers."""
        special = self._tokenizer.get_added_tokens_decoder()
        return [None if identity in special else self._tokenizer.id_to_token(identity) for identity in range(self.vocab_size)]

    @property
    def genders(self) -> tuple[str, ...]:
        """The genders that have a token."""
        return tuple(self._genders)

    @property
    def age_bands(self) -> tuple[str, ...]:
        """The age bands that have a token."""
        return tuple(self._age_bands)

    @property
    def folds_text(self) -> bool:
        """Whether case, compatibility forms (NFKC) and white space make no difference to a text's tokens: so in one that `train` made, not in most others."""
        normalizer = self._tokenizer.normalizer
        return normalizer is not None and bool(normalizer.normalize_str(_UNFOLDED) == _FOLDED)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, *, genders: Iterable[str | None] = (), age_bands: Iterable[str | None] = ()) -> QueryTokenizer:
        """Learn a vocabulary of at most `vocab_size` tokens; the same texts in any order give the same vocabulary.

        Args:
            texts: titles, brands, categories and training queries.
            vocab_size: all tokens, with the 256 bytes, the markers and the profile tokens.
            genders, age_bands: the values of the training requests, repeated or not; None is skipped.

        Raises:
            TokenizerError: `vocab_size` leaves no room for the bytes and markers.
        """
        markers = [*MARKERS, *_profile_tokens("GENDER", genders), *_profile_tokens("AGE", age_bands)]
        if vocab_size < 256 + len(markers):
            raise TokenizerError(f"vocab_size: expected at least {256 + len(markers)} (256 bytes and {len(markers)} markers), got {vocab_size}")
        tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Strip()]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)  # its pattern splits digits from letters
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=markers,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            min_frequency=2,
            show_progress=False,
        )
        tokenizer.train_from_iterator(sorted(set(texts)), trainer)
        return cls(tokenizer)

    @classmethod
    def from_pretrained(cls, folder: Path, *, genders: Iterable[str | None] = (), age_bands: Iterable[str | None] = ()) -> QueryTokenizer:
        """The tokenizer of a Hugging Face folder, with the markers and profile tokens added after its own tokens.

        Raises:
            TokenizerError: the folder has no `tokenizer.json`.
        """
        tokenizer = _read(folder / "tokenizer.json")
        markers = [*MARKERS, *_profile_tokens("GENDER", genders), *_profile_tokens("AGE", age_bands)]
        tokenizer.add_special_tokens([tokenizers.AddedToken(marker, special=True, normalized=False) for marker in markers])
        return cls(tokenizer)

    def save(self, path: Path) -> None:
        """Write `path` (a `tokenizer.json`)."""
        path.write_text(self.to_json())

    def to_json(self) -> str:
        """The tokenizer as the library's JSON."""
        return str(self._tokenizer.to_str())

    @classmethod
    def from_json(cls, text: str) -> QueryTokenizer:
        """The tokenizer written by `to_json`."""
        return cls(tokenizers.Tokenizer.from_str(text))

    @classmethod
    def load(cls, path: Path) -> QueryTokenizer:
        """Read a `tokenizer.json` written by `save`.

        Raises:
            TokenizerError: no such file, not a tokenizer, or one without the markers.
        """
        return cls(_read(path))

    def encode_batch(self, texts: Sequence[str], max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of texts, each cut to `max_tokens`.

        Returns:
            ids: int32 [T], all texts' tokens one after the other.
            offsets: int64 [n + 1]; text i is `ids[offsets[i] : offsets[i + 1]]`. An empty text has no tokens.
        """
        limit = max_tokens * _CHARACTERS_PER_TOKEN
        word_numbers: dict[str, int] = {}
        words_of = [[word_numbers.setdefault(word, len(word_numbers)) for word in text[:limit].split()] for text in texts]
        # No token spans a space, so a text is the sum of its words, and each distinct word is encoded once.
        encodings = self._tokenizer.encode_batch_fast([" " + word for word in word_numbers], add_special_tokens=False)
        pieces = [encoding.ids for encoding in encodings]
        encoded = [[token for number in words for token in pieces[number]][:max_tokens] for words in words_of]
        offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(tokens) for tokens in encoded], out=offsets[1:])
        ids = np.fromiter((token for tokens in encoded for token in tokens), dtype=np.int32, count=int(offsets[-1]))
        return ids, offsets

    def gender_id(self, gender: str | None) -> int:
        """The token of a gender, or -1 where it is None or was not seen at training."""
        return self._genders.get(_value(gender), -1)

    def age_band_id(self, age_band: str | None) -> int:
        """The token of an age band, or -1 where it is None or was not seen at training."""
        return self._age_bands.get(_value(age_band), -1)


def _value(text: str | None) -> str:
    return (text or "").strip().lower()


def _profile_tokens(name: str, values: Iterable[str | None]) -> list[str]:
    counts = Counter(_value(value) for value in values)
    del counts[""]
    frequent = sorted(counts, key=lambda value: (-counts[value], value))[:MAX_PROFILE_VALUES]
    return [f"[{name}={value}]" for value in sorted(frequent)]


def _read(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise TokenizerError(f"{path}: no tokenizer here; expected a tokenizer.json (jobs/train_generator.py writes one)")
    try:
        return tokenizers.Tokenizer.from_str(path.read_text())
    except Exception as error:  # the Rust library raises plain Exception
        raise TokenizerError(f"{path}: not a tokenizer.json ({error}); rerun jobs/train_generator.py") from error

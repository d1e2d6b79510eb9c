"""FastEagle: one causal pass and step-by-step drafting agree, and a drafter survives its files."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fasteagle_jax.decoding.interfaces import Accepted, Ranking
from fasteagle_jax.decoding.sampling import make_sampling
from fasteagle_jax.decoding.speculative import start
from fasteagle_jax.decoding.state import AXES, context_of, make_stop
from fasteagle_jax.decoding.tree import TreeSpec
from fasteagle_jax.devices.sharding import MeshShape, make_mesh, place_weights
from fasteagle_jax.drafters.fasteagle import FastEagle
from fasteagle_jax.drafters.files import load_drafter, save_drafter
from fasteagle_jax.drafters.table import default_config
from fasteagle_jax.errors import UserError
from fasteagle_jax.nn.attention import Cached
from fasteagle_jax.nn.kv_cache import EMPTY_SLOT
from fasteagle_jax.nn.linear import head_logits
from fasteagle_jax.nn.packed_attention import Packed
from fasteagle_jax.nn.rope import rotation
from tests.tiny_models import tiny_config, tiny_target

B, T, N, V = 2, 12, 3, 40
IDS = np.sort(np.random.default_rng(0).permutation(V)[:15]).astype(np.int32)
CLOSE = dict(rtol=1e-4, atol=1e-5)  # float32 through three layers, over past and fresh keys in another order


def make_drafter(seed: int = 0, **changes) -> FastEagle:
    """A random drafter with nothing at its neutral value: features are scaled, the draft vocabulary is no prefix."""
    config = default_config(tiny_config(), num_levels=N, feature_layers=(1, 3), **changes)

    def make() -> FastEagle:
        key = jax.random.key(seed)
        drafter = FastEagle(config, key)
        drafter.feature_scale[...] = jnp.linspace(0.5, 2.0, drafter.feature_scale[...].size)
        for i, level in enumerate([drafter.levels] if drafter.scans else drafter.levels):
            key = jax.random.fold_in(key, i)
            for norm in (level.input_norm.weight, level.mlp_norm.weight, level.norm.weight):
                norm[...] = norm[...] + 0.2 * jax.random.normal(key, norm[...].shape)
            if config.reinject:
                reinject = level.reinject.weight
                reinject[...] = 0.3 * jax.random.normal(key, reinject[...].shape)
        if config.correction:
            to_state = drafter.correction.to_state.weight
            to_state[...] = jax.random.normal(key, to_state[...].shape)
        if config.edges:
            table = drafter.edges.table
            table[...] = jax.random.normal(key, table[...].shape)
        return drafter

    drafter = jax.jit(make)()
    if drafter.token_ids is not None:
        drafter.token_ids[...] = jnp.asarray(IDS)
    return drafter


FORMS = {  # changes of the configuration, stacked
    "plain, stacked": ({}, True),
    "reduced vocabulary and reinjection, list": (dict(draft_vocab_size=len(IDS), reinject=True), False),
    "correction, stacked": (dict(correction=8), True),
    "reduced vocabulary and correction, list": (dict(draft_vocab_size=len(IDS), correction=8), False),
    "shared, side by side, stacked": (dict(levels="shared", side_by_side=True, reinject=True), True),
    "edges, stacked": (dict(edges=4, edges_reach=2, edges_gated=True), True),
    "reduced vocabulary, shared, edges, list": (
        dict(draft_vocab_size=len(IDS), levels="shared", edges=4, head="own"),
        False,
    ),
    "a window, stacked": (dict(window=3), True),
    "a window of one, list": (dict(window=1), False),
    "the first level's keys, stacked": (dict(context="shared", reinject=True, norm_inputs=True), True),
    "a first level of its own, stacked": (dict(context="shared", levels="first"), True),
    "the first level's keys, shared, edges, a window, list": (
        dict(context="shared", levels="shared", side_by_side=True, reinject=True, edges=4, window=3),
        False,
    ),
}


@pytest.fixture(scope="module")
def target():
    return tiny_target(num_layers=3)


@pytest.fixture(scope="module")
def stream(target):
    """A random text x[0..T], and the target's features of x[0..T-1]."""
    tokens = jax.random.randint(jax.random.key(5), (B, T + 1), 0, V)
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    return tokens, jax.jit(lambda: target(tokens[:, :-1], positions, causal(T), None, (1, 3)).features)()


def causal(num: int) -> jax.Array:
    return jnp.broadcast_to(jnp.tril(jnp.ones((num, num), bool)), (B, num, num))


@jax.jit
def one_pass(drafter, vocab, tokens, features):
    """What training computes: hidden states [N, B, T, H] and the fresh keys and values [N, B, K, T, D]."""
    return whole_pass(drafter, vocab, tokens, features)


def whole_pass(drafter, vocab, tokens, features, **how):
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    visible = Packed(jnp.ones((B, T), jnp.int32), drafter.config.window).visible()
    hidden, fresh = drafter.hidden_states(vocab.embedding, features, tokens[:, 1:], positions, visible, **how)
    return jnp.stack(list(hidden)), [jnp.stack(list(part)) for part in fresh]


@jax.jit
def chains(drafter, vocab, tokens, features, **how):
    """The guesses of a chain from every stream position on: int32 [N, B, T]."""
    outputs, _ = whole_pass(drafter, vocab, tokens, features, head_inputs=False, **how)  # of the levels
    guesses = []
    for h, level in zip(outputs, drafter.unstacked().levels, strict=True):
        nearest = jnp.stack([*guesses[::-1], tokens[:, 1:]][: drafter.config.edges_reach], axis=-1)  # [B, T, <= J]
        e = jnp.pad(
            vocab.embedding[nearest], [(0, 0)] * 2 + [(0, drafter.config.edges_reach - nearest.shape[-1]), (0, 0)]
        )
        h = drafter.head_input(level, h, e)
        logits = head_logits(h[..., : vocab.head.shape[1]], vocab.head)
        if drafter.edges is not None:
            logits += h[..., vocab.head.shape[1] :] @ drafter.edges.table[...].T
        best = jnp.argmax(logits, axis=-1)
        guesses.append(best if vocab.token_ids is None else vocab.token_ids[best])
    return jnp.stack(guesses)


# The others and the tests below pair every option with a form as well.
REPEATING = (
    "plain, stacked",
    "reduced vocabulary and correction, list",
    "shared, side by side, stacked",
    "reduced vocabulary, shared, edges, list",
    "a window, stacked",
    "the first level's keys, stacked",
)


@pytest.mark.parametrize(
    ("variant", "stacked"),
    [pytest.param(*form, id=name, marks=[pytest.mark.slow] * (name in REPEATING)) for name, form in FORMS.items()],
)
def test_drafting_step_by_step_with_a_cache_is_the_one_causal_pass_of_training(target, stream, variant, stacked):
    tokens, features = stream
    drafter = make_drafter(**variant)
    drafter = drafter if stacked else drafter.unstacked()
    vocab = drafter.vocab_weights(target)
    _, fresh = one_pass(drafter, vocab, tokens, features)
    best, said = np.asarray(chains(drafter, vocab, tokens, features)), np.asarray(tokens)

    chain, ranking = TreeSpec("chain"), Ranking(make_sampling(B), True)
    draft = jax.jit(lambda drafter, new, cache: drafter.draft(vocab, new, cache, chain, ranking))
    cache = drafter.empty_cache(B, T + 4, 4)
    window = drafter.config.window
    assert cache.num_slots == (T + 4 if window is None else window + 8)  # turns over
    # Rows go at different paces, one to four tokens a time; the first ones come without a draft, as in prefill.
    at = np.zeros(B, int)
    for step, counts in enumerate([[4, 2], [1, 3], [3, 1], [2, 4], [2, 2]]):
        index = jnp.asarray(np.minimum(at[:, None] + np.arange(4), T - 1))
        new = Accepted(
            jnp.take_along_axis(features, index[..., None], axis=1),
            jnp.take_along_axis(tokens, index + 1, axis=1),
            jnp.asarray(counts),
        )
        at += counts
        if step == 0:
            cache = jax.jit(lambda *args: args[0].extend(vocab, *args[1:], drafter.num_levels))(drafter, new, cache)
            continue
        made, cache = draft(drafter, new, cache)
        for b in range(B):
            # Guessed at stream position at - 1, after the pending token x[at].
            assert made.tokens[b].tolist() == [said[b, at[b]], *best[:, b, at[b] - 1].tolist()]
    assert cache.length.tolist() == at.tolist() == [T, T]
    # Every slot holds what the one pass has at its position; of these, the ones a next query would see are all there.
    num_cached = 1 if drafter.config.context == "shared" else N
    assert len(cache.k) == len(fresh[0]) == num_cached
    for level, b in np.ndindex(num_cached, B):
        positions = np.asarray(cache.positions[level][b])
        held = np.flatnonzero(positions != EMPTY_SLOT)
        assert set(range(T - (window or T), T)) <= set(positions[held])
        for part, expected in zip((cache.k, cache.v), fresh, strict=True):
            np.testing.assert_allclose(part[level][b][:, held], expected[level, b][:, positions[held]], **CLOSE)


SWITCHES = {
    "plain": {},
    "reinjection": {"reinject": True},
    "correction": {"correction": 8},
    "shared": {"levels": "shared", "side_by_side": True},
    "edges": {"edges": 4, "edges_reach": 3},
    "gated edges": {"edges": 4, "edges_reach": 3, "edges_gated": True, "head": "own"},
    "the first level's keys": {"context": "shared", "reinject": True, "norm_inputs": True},
    "a first level of its own": {"levels": "first"},
}


@pytest.mark.parametrize(  # reinjection is more than plain, gated edges more than edges
    "changes",
    [pytest.param(c, id=name, marks=[pytest.mark.slow] * (name in ("plain", "edges"))) for name, c in SWITCHES.items()],
)
def test_hidden_states_are_the_cascade_of_the_paper(target, stream, changes):
    """h_1 = L_1(FC([g, e])), h_i = L_i(h_i-1).

    With normed inputs FC reads g and e over their root mean squares; with reinjection each level's input gets
    FC([g, e]) once more; with correction what is read of h_i at position t knows the true token x[t+i], and with edges
    so do the last entries of what is read. Side by side, the MLP reads what attention does. With the first level's keys
    a level sees those at earlier positions, and its own.
    """
    tokens, features = stream
    drafter = make_drafter(**changes)
    turn = rotation(jnp.broadcast_to(jnp.arange(T), (B, T)), drafter.config.rope, drafter.config.head_dim)
    visible = causal(T)

    def normed(x):
        return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + drafter.config.rms_norm_eps)

    @jax.jit
    def slow(drafter, tokens, features):
        g = features @ (drafter.feature_scale[...][:, None] * drafter.fc.weight[...])
        e = target.embedding[...][tokens[:, 1:]]
        if drafter.config.norm_inputs:
            g, e = normed(g), normed(e)
        h = fused = g @ drafter.fuse.weight[...][:16] + e @ drafter.fuse.weight[...][16:]
        out, first = [], None
        for i, level in enumerate(drafter.unstacked().levels, 1):
            if level.reinject is not None:
                h = h + normed(fused) @ level.reinject.weight[...]
            has_layer = {"own": True, "shared": False, "first": i == 1}[drafter.config.levels]
            layer = level if has_layer else drafter.shared
            if drafter.config.context == "shared":
                q, k, v = layer.attention.project(level.input_norm(h), turn)
                first = first or (k, v)
                seen = jnp.concatenate([jnp.tril(visible, -1), visible & jnp.eye(T, dtype=bool)], axis=-1)
                both = (jnp.concatenate(pair, axis=1) for pair in zip(first, (k, v), strict=True))
                attended = layer.attention.output(Cached(seen)(q, *both))
            else:
                attended, _ = layer.attention(level.input_norm(h), turn, Cached(visible))
            read_by_mlp = h if drafter.config.side_by_side else h + attended
            h = h + attended + layer.mlp(level.mlp_norm(read_by_mlp))
            read = h
            token = normed(target.embedding[...][jnp.pad(tokens, ((0, 0), (0, N)))[:, i : i + T]])
            if (c := drafter.correction) is not None:
                units = normed(h) @ c.of_state.weight[...] + token @ c.of_token.weight[...]
                read = h + (units / (1 + jnp.exp(-units))) @ c.to_state.weight[...]
            read = normed(read) * level.norm.weight[...]
            if (c := drafter.edges) is not None:
                known = [jnp.pad(tokens, ((0, 0), (0, N)))[:, j : j + T] for j in range(i, max(i - 3, 0), -1)]
                e = jnp.concatenate([normed(target.embedding[...][x]) for x in known], axis=-1)
                of_path = e @ c.of_token.weight[...][: e.shape[-1]]
                if c.gate is not None:
                    units = of_path + normed(h) @ c.gate.weight[...]
                    of_path = units / (1 + jnp.exp(-units))
                read = jnp.concatenate([read, of_path * (normed(h) @ c.of_state.weight[...])], axis=-1)
            out.append(read)
        return jnp.stack(out)

    actual = one_pass(drafter, drafter.vocab_weights(target), tokens, features)[0]
    expected = slow(drafter, tokens, features)
    for i in range(N):
        known = T if drafter.has_split_draft else T - i  # where x[t+i] is in the text
        np.testing.assert_allclose(actual[i, :, :known], expected[i, :, :known], **CLOSE)


def test_a_level_reads_positions_up_to_its_own_alone(target, stream):
    tokens, features = stream
    drafter = make_drafter(reinject=True)
    vocab = drafter.vocab_weights(target)
    hidden = one_pass(drafter, vocab, tokens, features)[0]
    later = jnp.arange(T) >= 7
    for changed in (
        one_pass(drafter, vocab, tokens, jnp.where(later[:, None], features + 1, features))[0],
        one_pass(drafter, vocab, tokens.at[:, 8:].add(1) % V, features)[0],
    ):
        np.testing.assert_array_equal(changed[:, :, :7], hidden[:, :, :7])
        assert (np.abs(changed[:, :, 7:] - hidden[:, :, 7:]).max(axis=(1, 3)) > 1e-3).all()  # of every level


def test_a_drafter_that_reads_the_targets_cache_guesses_after_every_prefix_what_training_says(target):
    """Its drafts read the cache that prefill filled in chunks; training the same layer's keys, from its inputs."""
    changes = dict(context="target", context_layer=2, reinject=True, levels="shared", side_by_side=True, edges=4)
    drafter = make_drafter(**changes)
    tokens = jax.random.randint(jax.random.key(5), (B, T + 1), 0, V)
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))

    @jax.jit
    def guessed(drafter, target, tokens, n):
        """The chain after each row's first n tokens."""
        lengths, sampling = jnp.full((B,), n), make_sampling(B)
        stop = make_stop(B, 4)
        state, vocab = start(target, drafter, tokens, lengths, sampling, stop, max_new=4, num_levels=N, chunk=4)
        pending = state.new._replace(tokens=state.new.tokens.at[:, 0].set(tokens[:, n]))  # the text's, not the target's
        context = context_of(state.target_cache, drafter)
        ranking = Ranking(sampling, True)
        return drafter.draft(vocab, pending, state.drafter_cache, TreeSpec("chain"), ranking, context)[0].tokens[:, 1:]

    @jax.jit
    def trained(drafter, target, tokens):
        out = target(tokens[:, :-1], positions, causal(T), None, (1, 3, 2))
        features, inputs = jnp.split(out.features, [32], axis=-1)
        vocab, context = drafter.vocab_weights(target), (target.keys_values(2, inputs, positions),)
        return chains(drafter, vocab, tokens, features, context=context)

    expected = trained(drafter, target, tokens)
    padded = jnp.pad(tokens, ((0, 0), (0, 3)))  # four chunks
    for n in (1, 4, 7, T):
        for form in ((target, drafter), (target.unstacked(), drafter.unstacked())):
            assert guessed(form[1], form[0], padded, n).tolist() == expected[:, :, n - 1].T.tolist()
    cache = drafter.empty_cache(B, 64, 4)
    assert sum(x.size for x in jax.tree.leaves(cache)) == B  # a length and nothing else


def test_levels_beyond_the_trees_are_not_guessed(target, stream):
    tokens, features = stream
    drafter = make_drafter()
    vocab = drafter.vocab_weights(target)
    new = Accepted(features[:, :1], tokens[:, 1:2], jnp.ones(B, jnp.int32))
    cache, ranking = drafter.empty_cache(B, 4, 4), Ranking(make_sampling(B), True)

    @jax.jit
    def both(drafter):
        trees = (TreeSpec("chain"), TreeSpec("chain", levels=2))
        return [drafter.draft(vocab, new, cache, tree, ranking)[0].tokens for tree in trees]

    whole, cut = both(drafter)
    np.testing.assert_array_equal(whole[:, :3], cut)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(dict(correction=8), id="correction", marks=pytest.mark.slow),
        pytest.param(dict(edges=4, levels="shared", side_by_side=True, context="shared"), id="edges"),
    ],
)
def test_guesses_that_know_the_token_before_are_on_a_mesh_those_on_one_device(target, stream, changes):
    """Nothing else would tell: wrong guesses change no token."""
    tokens, features = stream
    drafter = make_drafter(reinject=True, **changes)
    vocab, tree, ranking = drafter.vocab_weights(target), TreeSpec("best_first", 8), Ranking(make_sampling(B), True)
    new = Accepted(features[:, :4], tokens[:, 1:5], jnp.asarray([4, 2]))

    def draft(drafter, vocab, new):
        return drafter.draft(vocab, new, drafter.empty_cache(B, 8, 4), tree, ranking)[0]

    expected = jax.jit(draft)(drafter, vocab, new)
    mesh = make_mesh(MeshShape(2, 2, 2))
    with jax.set_mesh(mesh):
        placed = place_weights(mesh, drafter), place_weights(mesh, vocab, AXES)
        made = jax.jit(draft)(*placed, jax.device_put(new, jax.NamedSharding(mesh, jax.P("data"))))
    if "edges" in changes:
        assert placed[0].edges.table[...].sharding.spec == jax.P("tensor", None)
    else:
        assert placed[0].correction.to_state.weight[...].sharding.spec == jax.P("tensor", "fsdp")
    np.testing.assert_allclose(made.scores, expected.scores, **CLOSE)
    jax.tree.map(np.testing.assert_array_equal, made._replace(scores=None), expected._replace(scores=None))


# --- files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "stacked"),
    [pytest.param(*form, id=name, marks=[pytest.mark.slow] * (name in REPEATING)) for name, form in FORMS.items()],
)
def test_a_drafter_is_the_same_after_its_files_with_the_features_scale_folded_in(
    target, stream, variant, stacked, tmp_path
):
    tokens, features = stream
    drafter = make_drafter(**variant)
    save_drafter(drafter, tmp_path / "drafter", "0123", {"steps": 7})
    loaded = load_drafter(tmp_path / "drafter", tiny_config(), "0123", stacked=stacked)
    assert loaded.config == drafter.config and loaded.stacked == stacked
    np.testing.assert_array_equal(loaded.feature_scale[...], 1)
    np.testing.assert_allclose(
        loaded.fc.matrix, drafter.fc.weight[...] * drafter.feature_scale[...][:, None], rtol=1e-6, atol=0
    )
    if "draft_vocab_size" in variant:
        np.testing.assert_array_equal(loaded.token_ids[...], IDS)
    expected = one_pass(drafter, drafter.vocab_weights(target), tokens, features)[0]
    np.testing.assert_allclose(one_pass(loaded, loaded.vocab_weights(target), tokens, features)[0], expected, **CLOSE)


def test_a_loaded_drafter_saved_again_gives_the_same_tensors(tmp_path):
    save_drafter(make_drafter(), tmp_path / "a", "0123", {})
    save_drafter(load_drafter(tmp_path / "a", tiny_config(), "0123"), tmp_path / "b", "0123", {})
    jax.tree.map(
        np.testing.assert_array_equal,
        load_file(tmp_path / "a/model.safetensors"),
        load_file(tmp_path / "b/model.safetensors"),
    )


def test_a_drafters_folder_says_what_it_was_made_of_and_has_torchs_shapes(tmp_path):
    save_drafter(make_drafter(), tmp_path / "drafter", "0123", {"steps": 7})
    config = json.loads((tmp_path / "drafter/config.json").read_text())
    assert config["steps"] == 7 and config["target_fingerprint"] == "0123" and config["num_levels"] == N
    shapes = {name: value.shape for name, value in load_file(tmp_path / "drafter/model.safetensors").items()}
    assert shapes["fc.weight"] == (16, 32) and shapes["levels.2.mlp.down_proj.weight"] == (16, 32)
    assert len(shapes) == 2 + N * 10 and list(tmp_path.iterdir()) == [tmp_path / "drafter"]


def refused(folder, match: str, config=None, fingerprint: str = "0123", **options: bool) -> None:
    with pytest.raises(UserError, match=match) as caught:
        load_drafter(folder, config or tiny_config(), fingerprint, **options)
    assert "\n" not in str(caught.value)


@pytest.fixture
def saved(tmp_path):
    save_drafter(make_drafter(), tmp_path / "drafter", "0123", {})
    return tmp_path / "drafter"


def test_a_drafter_of_other_weights_is_a_warning_or_with_strict_refused_and_of_other_sizes_refused(saved, caplog):
    """Exactness does not depend on it: a fine-tune of the target can use its drafter."""
    difference = "was trained for target 0123, this one's weights are 4567"
    refused(saved, difference, fingerprint="4567", strict=True)
    assert not caplog.records
    load_drafter(saved, tiny_config(), "4567")
    assert difference in caplog.text and "answers stay exact" in caplog.text
    refused(saved, "hidden_size 16, the target 24", dataclasses.replace(tiny_config(), hidden_size=24))
    refused(saved, "vocab_size 40, the target 41", dataclasses.replace(tiny_config(), vocab_size=41))


def test_damaged_files_are_refused(saved):
    file = saved / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    refused(saved, "model.safetensors has the SHA-256")
    file.unlink()
    refused(saved, "model.safetensors cannot be read")
    file.write_bytes(whole)
    (saved / "config.json").write_text('{"architectures": ["Fa')
    refused(saved, "config.json cannot be read")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"intermediate_size": 10**12}, "does not fit its config.json"),
        ({"num_levels": 10**9}, "num_levels is 1000000000: give at most 1024"),
        ({"feature_layers": [0, "a"]}, "feature_layers are"),
        ({"architectures": 7}, "is not of a"),
        ({"kind": ["fasteagle"]}, "fasteagle"),
        ({"vocab_size": "many"}, "vocab_size is 'many': give a whole number"),
    ],
)
def test_sizes_that_the_file_does_not_have_are_refused_before_memory_is_taken_for_them(saved, changes, match):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | changes))
    refused(saved, match)


def test_tensors_that_do_not_fit_the_configuration_are_named(saved):
    file = saved / "model.safetensors"
    tensors = load_file(file)
    tensors["levels.0.norm.weight"] = np.ones(9, np.float32)
    del tensors["levels.1.self_attn.q_proj.weight"]
    tensors["levels.7.norm.weight"] = np.ones(16, np.float32)
    save_file(tensors, file)
    refused(saved, "model.safetensors has the SHA-256 [0-9a-f]{16}..., its config.json says")
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"sha256": 0}))
    refused(saved, "its config.json says 0...: copy it again")
    del config["sha256"]  # as in folders of older versions
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        load_drafter(saved, tiny_config(), "0123")
    for name in ("levels.0.norm.weight (9,)", "levels.1.self_attn.q_proj.weight", "levels.7.norm.weight"):
        assert name in str(caught.value)


def test_a_folder_that_is_no_drafter_is_refused(saved, tmp_path):
    refused(tmp_path / "nowhere", "holds no config.json")
    (saved / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    refused(saved, "is not of a FastEagleDrafter")


def test_an_existing_folder_is_never_overwritten(saved):
    before = (saved / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="exists: name another output folder"):
        save_drafter(make_drafter(seed=1), saved, "0123", {})
    assert (saved / "model.safetensors").read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["drafter"]

"""Profiles of operators, prices of unknown ones, and predictions of whole networks."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from archfront.db.ledger import Ledger
from archfront.errors import InputError
from archfront.evaluators.evaluator import EvaluationContext, Task
from archfront.evaluators.latency import profile as profile_module
from archfront.evaluators.latency.device import check_device, fingerprint
from archfront.evaluators.latency.evaluator import Latency
from archfront.evaluators.latency.measurement import Settings, affordable
from archfront.evaluators.latency.network_profile import network_latency
from archfront.evaluators.latency.predictors.network import NetworkLatency
from archfront.evaluators.latency.predictors.operator_prices import OperatorPrices
from archfront.evaluators.latency.predictors.populations import BlockTerms, GenotypeLatency
from archfront.evaluators.latency.profile import Profile, ProfileProgress, profile_operators
from archfront.evaluators.latency.space_traces import traced_genotypes
from archfront.evaluators.latency.tracing import Trace, trace
from archfront.search.profiling import changed_devices, extend_profile, stored_profile
from archfront.spaces.registry import SPACES

QUICK = Settings(rounds=3, sample_ms=0.2, warmup_ms=1, warmup_limit_ms=20)
SPACE = SPACES.build({"name": "fbnet-tiny", "resolution": 8, "layers": 3}, "space")


def network(width: int, depth: int) -> Trace:
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Conv2d(3 if i == 0 else width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return trace(nn.Sequential(*layers), (3, 16, 16))


NETWORKS = [network(width, depth) for width in (4, 8, 12, 16, 24, 32, 48, 64) for depth in (1, 2, 4, 6)]


def made_up(networks: list[Trace]) -> Profile:
    """A device that computes a giga multiply-adds in 20 ms, moves a gigabyte in 100 and takes 4 us a call."""
    operators = {o.call: o for n in networks for o in n.operators}.values()
    moved = {o.call: (o.read_bytes + o.written_bytes) / 1e9 for o in operators}
    return Profile(
        device=fingerprint(1).to_json(),
        threads=1,
        ms={o.call: 20 * o.macs / 1e9 + 100 * moved[o.call] + 4e-3 for o in operators},
        std_ms={o.call: 0.0 for o in operators},
        facts={o.call: (o.macs, o.read_bytes, o.written_bytes, o.weight_bytes) for o in operators},
    )


def true_ms(profile: Profile, networks: list[Trace]) -> np.ndarray:
    """Networks whose modules cost 2 us each besides their operators."""
    return np.array([1.1 * sum(profile.ms[o.call] for o in n.operators) + 2e-3 * n.modules for n in networks])


def test_the_correction_finds_what_networks_cost_besides_their_operators() -> None:
    profile = made_up(NETWORKS)
    truth = true_ms(profile, NETWORKS)
    predictor = NetworkLatency(profile).fit(NETWORKS[::2], truth[::2])
    found = predictor.predict(NETWORKS[1::2], 0.8)
    assert np.abs(found.ms / truth[1::2] - 1).max() < 0.03
    assert ((found.low_ms <= truth[1::2]) & (truth[1::2] <= found.high_ms)).mean() >= 0.6
    assert found.extrapolated == ((),) * 16
    assert predictor.correction["operators_ms"] > 0.9


def test_a_predictor_survives_json() -> None:
    profile = made_up(NETWORKS)
    predictor = NetworkLatency(profile).fit(NETWORKS, true_ms(profile, NETWORKS))
    again = NetworkLatency.from_json(json.loads(json.dumps(predictor.to_json())))
    assert again.digest == predictor.digest
    for name in ("ms", "low_ms", "high_ms"):
        assert np.array_equal(getattr(again.predict(NETWORKS), name), getattr(predictor.predict(NETWORKS), name))
    refitted = NetworkLatency(profile).fit(NETWORKS, 2 * true_ms(profile, NETWORKS))
    assert refitted.digest != predictor.digest
    with pytest.raises(InputError, match="is no predictor"):
        NetworkLatency.from_json({"format": "else"})


def test_operators_never_measured_are_guessed_and_named() -> None:
    seen, unseen = NETWORKS[:-4], NETWORKS[-4:]
    profile, everything = made_up(seen), made_up(NETWORKS)
    new = {o.call: o for n in unseen for o in n.operators if o.call not in profile.ms}
    guessed = OperatorPrices(profile).guess(list(new.values()))
    truth = np.array([everything.ms[call] for call in new])
    # 64 channels, where the profile ends at 48: the roofline knows what trees alone cannot.
    assert np.median(np.abs(guessed / truth - 1)) < 0.15
    predictor = NetworkLatency(profile).fit(seen, true_ms(profile, seen))
    [notes] = predictor.predict(unseen[-1:]).extrapolated
    assert "operators never measured" in notes[0]
    assert "conv" in notes[0]


def test_intervals_promise_for_networks_alike() -> None:
    """Networks far apart serve the fit, but their larger errors do not widen the intervals."""
    profile = made_up(NETWORKS)
    rng = np.random.default_rng(0)
    spread = [i % 2 == 0 for i in range(len(NETWORKS))]
    noise = np.where(spread, rng.choice([0.8, 1.2], len(NETWORKS)), rng.choice([0.98, 1.02], len(NETWORKS)))
    ms = true_ms(profile, NETWORKS) * noise
    narrow = NetworkLatency(profile).fit(NETWORKS, ms, [not far for far in spread]).relative_width(0.8)
    wide = NetworkLatency(profile).fit(NETWORKS, ms).relative_width(0.8)
    assert 0.02 < narrow < 0.15 < wide


def test_more_of_quick_networks_are_measured() -> None:
    counts = [affordable(ms, Settings(), seconds=45, least=29, most=99) for ms in (0.1, 10.0, 20.0, 100.0)]
    assert counts[0] == 99 > counts[1] > counts[2] > counts[3] == 29


def test_too_little_to_learn_from_is_refused() -> None:
    profile = made_up(NETWORKS)
    with pytest.raises(InputError, match="Measure 6 or more"):
        NetworkLatency(profile).fit(NETWORKS[:3], np.ones(3))
    with pytest.raises(InputError, match="not positive and finite"):
        NetworkLatency(profile).fit(NETWORKS[:6], np.array([1, 2, 3, 4, 5, np.nan]))
    few = dict(list(profile.ms.items())[:10])
    with pytest.raises(InputError, match="has 10 operators"):
        OperatorPrices(replace(profile, ms=few))


def test_a_profile_is_measured_kept_and_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_module, "_CHUNK_OPERATORS", 4)
    monkeypatch.setattr(profile_module, "OPERATOR_SETTINGS", QUICK)
    ledger, device = Ledger.open(str(tmp_path / "a.db")), fingerprint(1)
    operators = list({o.call: o for o in network(4, 3).operators}.values())

    class Killed(Exception):
        pass

    def after(chunks: int) -> Callable[[ProfileProgress], None]:
        seen: list[ProfileProgress] = []

        def observe(progress: ProfileProgress) -> None:
            seen.append(progress)
            if len(seen) > chunks:
                raise Killed

        return observe

    with pytest.raises(Killed):
        extend_profile(ledger, device, operators, after(1))
    assert len(stored_profile(ledger, device).ms) == 4
    counts: list[tuple[int, int]] = []
    made = extend_profile(ledger, device, operators, lambda p: counts.append((p.done, p.total)))
    assert counts[0] == (0, len(operators) - 4)
    assert counts[-1] == (len(operators) - 4,) * 2
    assert set(made.ms) == {o.call for o in operators}
    assert all(ms > 0 for ms in made.ms.values())
    assert stored_profile(ledger, device).to_json() == made.to_json()
    assert changed_devices(ledger, device) == []
    assert "threads was 1 and is 2" in changed_devices(ledger, fingerprint(2))[0]
    ledger.close()


def test_an_operator_that_cannot_run_is_kept_as_failed_and_another_device_is_refused() -> None:
    here = Profile(device=fingerprint(1).to_json(), threads=1)
    good = network(4, 1).operators[0]
    bad = replace(good, call='["aten.nothing.default", [], {}]')
    made = profile_operators([good, bad], here, settings=QUICK)
    assert "no operator aten.nothing" in made.failed[bad.call]
    assert made.missing([good.call, bad.call]) == []
    there = replace(here, device={**here.device, "model": "Z80", "digest": "other"})
    with pytest.raises(InputError, match=r"model 'Z80' there.*archfront profile"):
        profile_operators([good], there, settings=QUICK)


def test_devices_that_are_not_there_are_named() -> None:
    assert check_device("cpu") == "local-cpu"
    with pytest.raises(InputError, match=r"has 0 CUDA devices.*local-cpu"):
        check_device("cuda:0")
    with pytest.raises(InputError, match="not a known device"):
        check_device("abacus")


def test_the_evaluator_prices_a_space_by_its_operators() -> None:
    made = network_latency(
        SPACE, fingerprint(1), samples=12, networks=12, randoms=0, operator_settings=QUICK, network_settings=QUICK
    )
    evaluator = Latency(mode="operators")
    artifact = {**made.to_json(), "device": fingerprint(1).to_json()}
    context = EvaluationContext(space=SPACE, artifacts={"latency": artifact})
    genotypes = [["skip", "skip", "skip"], ["k3_e6", "k5_e6", "k5_e6"]]
    tasks = [Task(number=i, genotype=g, key=str(i), fidelity=0, repeat=0, seed=0) for i, g in enumerate(genotypes)]
    light, heavy = evaluator.evaluate(tasks, context)
    assert not isinstance(light, Exception)
    assert not isinstance(heavy, Exception)
    assert light.metrics["latency_ms"].value < heavy.metrics["latency_ms"].value
    found = heavy.metrics["latency_ms"]
    assert found.provenance == "predicted"
    assert str(found.predictor).startswith(f"operators:{made.digest[:8]}")
    [traced] = traced_genotypes(SPACE, genotypes[1:])
    assert found.value == pytest.approx(made.predict([traced]).ms[0], rel=1e-9)
    assert found.std == pytest.approx(made.relative_width(0.9) * found.value / 1.6449)
    assert found.device == fingerprint(1).digest


class Plain:
    """A space that says nothing of blocks."""

    name, resolution, in_channels = "plain", 8, 1

    def build(self, genotype: list[str]) -> nn.Module:
        return SPACE.build(genotype)


def test_a_space_without_blocks_is_traced_genotype_by_genotype() -> None:
    genotypes = SPACE.to_json(SPACE.sample(np.random.default_rng(0), 12))
    traces = list(traced_genotypes(SPACE, genotypes))
    profile = made_up(traces)
    predictor = NetworkLatency(profile).fit(traces, true_ms(profile, traces))
    whole = GenotypeLatency(SPACE, predictor).of(genotypes)
    one_by_one = GenotypeLatency(Plain(), predictor).of([*genotypes, ["nonsense"]])  # type: ignore[arg-type]
    assert isinstance(one_by_one.pop(), Exception)
    for first, second in zip(whole, one_by_one, strict=True):
        assert not isinstance(first, Exception)
        assert not isinstance(second, Exception)
        assert first[0] == pytest.approx(second[0], rel=1e-9)
        assert first[1] is second[1] is False


@pytest.mark.parametrize("layers", [3, 12])
def test_a_population_at_once_is_what_its_networks_are_one_by_one(layers: int) -> None:
    space = SPACES.build({"name": "fbnet-tiny", "resolution": 16, "layers": layers}, "space")
    population = space.sample(np.random.default_rng(3), 30)
    traces = list(traced_genotypes(space, space.to_json(population)))
    profile = made_up(traces[:20])  # some operators of the last ones are left to the trees
    predictor = NetworkLatency(profile).fit(traces[:20], true_ms(profile, traces[:20]))
    blocks = BlockTerms(space, predictor)  # type: ignore[arg-type]
    assert np.allclose(blocks.terms(population), predictor.terms(traces), rtol=1e-9)
    assert np.allclose(blocks.ms(population), predictor.predict(traces).ms, rtol=1e-9)
    many = population[np.random.default_rng(0).integers(30, size=5000)]
    assert np.array_equal(blocks.ms(many)[:2048], blocks.ms(many[:2048]))

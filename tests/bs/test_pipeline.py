"""The main path over the link's twin in memory: equality with the oracle, and devices that fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import inprocess
import msgspec
import numpy as np
import pytest
from inprocess import System, open_system, run_sequence

from wdmoe.bs.latency import LatencyTracker
from wdmoe.bs.microbatch import answers_of, pack_questions, pack_sequence
from wdmoe.bs.policies import Exact, Policy, Wlr, parse_policy
from wdmoe.bs.questions import Answer, Choice, Question
from wdmoe.bs.records import summarise
from wdmoe.bs.scoring import DistributedScorer
from wdmoe.bs.stages import new_cache
from wdmoe.profiles.device_profile import Emulated, Point
from wdmoe.runtime.errors import DeviceFailed, DevicesMissing, DeviceTimeout
from wdmoe.runtime.manifest import BsManifest, read_manifest
from wdmoe.runtime.messages import ErrorReport, ExpertReply, ExpertRequest, Frame, Goodbye, Message, decode, encode

PROMPT = list(b"How does one keep bread fresh?")
QUESTION = Question(
    "piqa/0",
    (
        Choice(tuple(b"Question: bread\nAnswer:"), tuple(b" in a box")),
        Choice(tuple(b"Question: bread\nAnswer:"), tuple(b" in a bag of rice")),
    ),
)


def reference_logits(checkpoint: Path, token_ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Logits of transformers in float32 and in float64: [n, vocab] each."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    found = []
    for dtype in (torch.float32, torch.float64):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
        ).eval()
        with torch.no_grad():
            found.append(model(torch.tensor([token_ids])).logits[0].numpy())
    return found[0], found[1]


@pytest.mark.parametrize("engine", ["numpy", "onnxruntime"])
def test_the_distributed_model_equals_transformers(any_bundle: Path, engine: str) -> None:
    single, double = reference_logits(any_bundle.parent / "checkpoint", PROMPT)
    with open_system(any_bundle, engine=engine) as system:
        ours = run_sequence(system, PROMPT)
    rounding = np.sqrt(np.mean((single - double) ** 2))
    assert np.sqrt(np.mean((ours - single) ** 2)) <= 2 * rounding
    np.testing.assert_array_equal(ours.argmax(axis=1), single.argmax(axis=1))


def test_decoding_with_the_cache_equals_one_pass_over_all_tokens(any_bundle: Path) -> None:
    with open_system(any_bundle) as system:
        tokens, stepwise = inprocess.greedy(system, PROMPT, 8)
        at_once = run_sequence(system, PROMPT + tokens[:-1])[len(PROMPT) - 1 :]
    np.testing.assert_allclose(stepwise, at_once, atol=2e-5)


def test_the_trie_of_choices_scores_as_each_choice_alone(any_bundle: Path) -> None:
    with open_system(any_bundle) as system:
        together = score(system, [QUESTION])[0]
        alone = [score(system, [Question("alone", (choice,))])[0] for choice in QUESTION.choices]
        logits = run_sequence(system, [*QUESTION.choices[0].context, *QUESTION.choices[0].continuation[:-1]])
    np.testing.assert_allclose(together.log_likelihoods, [a.log_likelihoods[0] for a in alone], atol=2e-5)
    continuation = QUESTION.choices[0].continuation
    rows = logits[-len(continuation) :].astype(np.float64)
    by_hand = sum(row[token] - np.log(np.exp(row).sum()) for row, token in zip(rows, continuation, strict=True))
    assert together.log_likelihoods[0] == pytest.approx(by_hand, abs=2e-5)


def test_a_tries_rows_are_fewer_than_its_sequences_tokens() -> None:
    microbatch = pack_questions([QUESTION], None)
    apart = sum(len(c.context) + len(c.continuation) - 1 for c in QUESTION.choices)
    shared = len(QUESTION.choices[0].context) + len(b" in a b")
    assert len(microbatch.token_ids) == apart - shared
    assert microbatch.positions.max() == max(len(c.context) + len(c.continuation) - 2 for c in QUESTION.choices)


def test_half_precision_on_the_wire_stays_close_to_full(bundle: Path) -> None:
    with open_system(bundle, wire="fp16") as half, open_system(bundle, wire="fp32") as full:
        difference = np.abs(run_sequence(half, PROMPT) - run_sequence(full, PROMPT)).max()
    assert 0 < difference < 0.02


def test_int8_on_the_wire_stays_near_and_says_what_it_loses(bundle: Path) -> None:
    with open_system(bundle, wire="int8") as small, open_system(bundle, wire="fp32") as full:
        difference = np.abs(run_sequence(small, PROMPT) - run_sequence(full, PROMPT)).max()
        scorer = DistributedScorer(small.pipeline, Exact(), 1, None)
        scorer.score([QUESTION])
        summary = summarise(scorer.records)
    assert 0 < difference < 0.3
    assert summary.wire_error is not None and 0.001 < summary.wire_error < 0.01
    assert summary.bytes_down == summary.bytes_up == summary.pairs * (4 + 32)


def test_several_in_flight_answer_as_one_at_a_time(bundle: Path) -> None:
    questions = [dataclasses.replace(QUESTION, name=f"q/{n}", choices=QUESTION.choices[: 1 + n % 2]) for n in range(5)]
    with open_system(bundle) as system:
        for device in system.hub.devices.values():
            device.latency.ratios.clear()
        one = score(system, questions, Exact(), in_flight=1)
        three = score(system, questions, Exact(), in_flight=3)
    assert one == three  # to the bit: partial sums are added by device, not by arrival


def test_questions_in_one_microbatch_answer_as_each_alone(any_bundle: Path) -> None:
    questions = [
        Question(f"q/{n}", (Choice(tuple(f"Question: {'so ' * n}\nAnswer:".encode()), tuple(b" yes")), choice))
        for n, choice in enumerate((*QUESTION.choices, *QUESTION.choices, QUESTION.choices[0]))
    ]
    done: list[int] = []
    with open_system(any_bundle) as system:
        alone = score(system, questions)
        scorer = DistributedScorer(system.pipeline, Exact(), 2, None, batch=3)
        together = scorer.score(questions, lambda number, answer: done.append(number))
    summary = summarise(scorer.records)
    assert sorted(done) == list(range(5)) and [record.questions for record in scorer.records] == [3, 2]
    assert summary.questions == 5
    for ours, theirs in zip(together, alone, strict=True):
        np.testing.assert_allclose(ours.log_likelihoods, theirs.log_likelihoods, atol=2e-5)
        assert ours.greedy == theirs.greedy


def test_wlr_sends_less_and_says_how_much_it_dropped(bundle: Path) -> None:
    summaries = {}
    for policy in (Exact(), Wlr(alpha=1.0)):
        with open_system(bundle) as system:
            scorer = DistributedScorer(system.pipeline, policy, 1, None)
            scorer.score([QUESTION])
            summaries[policy.describe()] = summarise(scorer.records)
    exact, wlr = summaries["exact"], summaries["wlr:alpha=1.0"]
    assert exact.dropped == 0 and exact.gate_mass_dropped == 0 and exact.theta_mean is None
    assert wlr.dropped == wlr.droppable > 0  # theta 1 drops one pair of each token, and top-2 has one to spare
    assert wlr.bytes_down < exact.bytes_down and wlr.bytes_up < exact.bytes_up
    assert 0 < wlr.gate_mass_dropped < 0.5
    width_bytes = 4 * 32
    assert exact.bytes_down == exact.bytes_up == exact.pairs * width_bytes


def break_device(system: System, name: str, edit: Callable[[Message], Message | None]) -> None:
    handler = system.link.peers[name.encode()]
    system.link.peers[name.encode()] = inprocess.edited(handler, system.manifest.model.d_model, edit)


def only_replies(change: Callable[[Message], Message | None]) -> Callable[[Message], Message | None]:
    return lambda message: change(message) if isinstance(message.header, ExpertReply) else message


def with_rows(message: Message, value: float) -> Message:
    assert message.rows is not None
    rows = message.rows.copy()
    rows[-1, -1] = value
    return Message(message.header, rows)


def doubled(message: Message) -> Message:
    assert isinstance(message.header, ExpertReply) and message.rows is not None
    header = msgspec.structs.replace(message.header, rows=2 * message.header.rows)
    return Message(header, np.concatenate([message.rows, message.rows]))


def complaint(message: Message) -> Message:
    assert isinstance(message.header, ExpertReply)
    return Message(ErrorReport("out of memory", message.header.request_id))


@pytest.mark.parametrize(
    ("edit", "error", "words"),
    [
        (lambda message: None, DeviceTimeout, r"device-2: no answer for block 0 of prompt in .* silent for"),
        (only_replies(lambda message: None), DeviceTimeout, r"device-2: no answer .* though it answers pings"),
        (only_replies(lambda message: with_rows(message, np.nan)), DeviceFailed, "device-2: sent rows that are not"),
        (only_replies(lambda message: with_rows(message, np.inf)), DeviceFailed, "device-2: sent rows that are not"),
        (only_replies(doubled), DeviceFailed, r"device-2: answered .* rows to a request of"),
        (only_replies(complaint), DeviceFailed, "device-2: reports: out of memory"),
        (only_replies(lambda _: Message(Goodbye("power off"))), DeviceFailed, r"device-2: left \(power off\)"),
    ],
    ids=["vanished", "stuck", "nan", "inf", "wrong rows", "error", "goodbye"],
)
def test_exact_names_the_device_that_fails_instead_of_answering(
    bundle: Path, edit: Callable[[Message], Message | None], error: type[Exception], words: str
) -> None:
    with open_system(bundle) as system:
        run_sequence(system, PROMPT)  # all is well at first
        break_device(system, "device-2", edit)
        with pytest.raises(error, match=words):
            run_sequence(system, PROMPT)


def test_a_silent_device_is_lost_within_its_deadline(bundle: Path) -> None:
    with open_system(bundle) as system:
        break_device(system, "device-1", lambda message: None)
        before_s = system.clock.now_s()
        with pytest.raises(DeviceTimeout):
            run_sequence(system, PROMPT)
        assert system.clock.now_s() - before_s < 4.0


def test_a_device_that_restarts_is_asked_again_and_the_answer_is_the_same(bundle: Path) -> None:
    with open_system(bundle) as system:
        expected = run_sequence(system, PROMPT)
        handler = system.link.peers[b"device-3"]
        lost: list[object] = []

        def restart_once(message: Message) -> Message | None:
            if not lost and isinstance(message.header, ExpertReply):
                lost.append(message)
                hello = msgspec.structs.replace(system.services["device-3"]._hello(), session="second-start")
                system.link.peers[b"device-3 again"] = handler
                system.link.deliver(b"device-3 again", encode(Message(hello)))
                system.clock.advance(10.0)  # so long that the name counts as free
                return None
            return message

        break_device(system, "device-3", restart_once)
        np.testing.assert_array_equal(run_sequence(system, PROMPT), expected)
        assert lost


def test_a_late_reply_of_an_abandoned_run_is_ignored(bundle: Path) -> None:
    with open_system(bundle) as system:
        expected = run_sequence(system, PROMPT)
        held: list[Message] = []

        def hold(message: Message) -> Message | None:
            if isinstance(message.header, ExpertReply) and not held:
                held.append(message)
                return None
            return message

        break_device(system, "device-0", hold)
        with pytest.raises(DeviceTimeout):
            run_sequence(system, PROMPT)
        system.link.deliver(b"device-0", encode(held[0]))
        np.testing.assert_array_equal(run_sequence(system, PROMPT), expected)
        assert system.pipeline.requests.late_replies == 1


def test_a_device_that_left_is_missed_at_the_next_block(bundle: Path) -> None:
    with open_system(bundle) as system:
        system.link.deliver(b"device-1", encode(Message(Goodbye("moved away"))))
        system.hub.turn(0.0)
        with pytest.raises(DevicesMissing, match="expert 2 of block 0 is served by no connected device"):
            run_sequence(system, PROMPT)
        with pytest.raises(DevicesMissing, match="no device-1"):
            system.hub.wait_for_devices(1.0)


def test_a_prompt_longer_than_its_cache_is_refused(bundle: Path) -> None:
    with open_system(bundle) as system:
        cache = new_cache(system.manifest, 4)
        with pytest.raises(ValueError, match="5 tokens do not fit the KV cache of 4"):
            pack_sequence("prompt", [1, 2, 3, 4, 5], cache, None)
        with pytest.raises(ValueError, match="knows 256 positions"):
            new_cache(system.manifest, 257)


def score(system: System, questions: list[Question], policy: Policy | None = None, in_flight: int = 1) -> list[Answer]:
    return DistributedScorer(system.pipeline, policy or Exact(), in_flight, None).score(questions)


def test_answers_are_split_by_choice(bundle: Path) -> None:
    with open_system(bundle) as system:
        ((_, result, _),) = system.pipeline.run([pack_questions([QUESTION], None)], Exact())
    (answer,) = answers_of([QUESTION], result)
    n = len(QUESTION.choices[0].continuation)
    assert answer.log_likelihoods[0] == pytest.approx(float(result.logprobs[:n].sum()), rel=1e-6)
    assert answer.log_likelihoods[1] == pytest.approx(float(result.logprobs[n:].sum()), rel=1e-6)


def test_policies_weigh_by_norms_that_a_text_gave_and_by_no_others(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = parse_policy("top-cut:importance=norm")  # it looks at no latency
    with open_system(bundle) as system, pytest.raises(ValueError, match="make them with wdmoe-export calibrate"):
        run_sequence(system, PROMPT, policy)

    def by_norms(norms: list[float]) -> np.ndarray:
        model = read_manifest(bundle / "bs", BsManifest).model
        rows = np.tile(np.array(norms, np.float32), (model.n_blocks, 1))
        monkeypatch.setattr("wdmoe.bs.pipeline.norms_of_text", lambda manifest: rows)
        with open_system(bundle) as system:
            return run_sequence(system, PROMPT, policy)

    even, odd = [1.0, 1e-3] * 4, [1e-3, 1.0] * 4
    assert np.array_equal(by_norms(even), by_norms(even))
    assert not np.array_equal(by_norms(even), by_norms(odd))


def test_on_a_channel_that_all_share_the_longest_tail_is_sent_to_first(bundle: Path) -> None:
    sent: list[str] = []

    def noted(name: str, handler: inprocess.Handler, system: System) -> inprocess.Handler:
        def handle(frames: Sequence[Frame]) -> Iterable[Sequence[Frame]]:
            if isinstance(decode(frames, system.manifest.model.d_model).header, ExpertRequest):
                sent.append(name)
            return handler(frames)

        return handle

    def order(shared: bool) -> list[str]:
        sent.clear()
        with open_system(bundle) as system:
            for number, (name, device) in enumerate(sorted(system.hub.devices.items())):
                emulated = Emulated("orin-nano-8gb", "wifi-6-mid", 0, 32, 64, "fp16", shared=shared)
                points = tuple(Point(n, 4.0**number, 4.0**number) for n in (1, 512))
                profile = msgspec.structs.replace(
                    device.latency.profile, origin="emulated", emulated=emulated, points=points
                )
                device.latency = LatencyTracker(profile)
                system.link.peers[name.encode()] = noted(name, system.link.peers[name.encode()], system)
            run_sequence(system, PROMPT)
        return sent[:4]

    assert order(shared=True) == [f"device-{k}" for k in (3, 2, 1, 0)]
    assert order(shared=False) == [f"device-{k}" for k in range(4)]

"""Requests share model calls, and each gets its own response."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import numpy as np
import pytest

from common.errors import RewardInvalid, RewardOverloaded, RewardRejected
from common.rewards.api import ByteArray, FloatArray, GradientRequest, Metadata, ScoreRequest
from reward_servers.batcher import Batcher, BatchLimits, Device, Speed
from reward_servers.fair_queue import Response
from reward_servers.metrics import ServerMetrics
from reward_servers.scorers.base import ModelUnavailable
from tests.helpers.toy_scorers import RecordingScorer

TIMEOUT = 10.0


def request(value: int, count: int = 1, prompt: str = "", side: int = 4) -> ScoreRequest:
    return ScoreRequest(np.full((count, side, side, 3), value, np.uint8), [prompt or str(value)] * count)


def drive(
    scenario: Callable[[Batcher, RecordingScorer], Awaitable[None]],
    max_batch: int = 4,
    max_wait_s: float = 0.0,
    queue_images: int = 100,
    share_calls: bool = True,
) -> RecordingScorer:
    """Run a scenario against a live batcher."""
    scorer = RecordingScorer()

    async def run() -> None:
        metrics = ServerMetrics().of_scorer(scorer.name, *scorer.score_range)
        device = Device()
        limits = BatchLimits(max_batch, max_wait_s, queue_images, share_calls)
        batcher = Batcher(scorer, scorer.name, limits, device, metrics)
        feeding = asyncio.create_task(batcher.run())
        try:
            async with asyncio.timeout(TIMEOUT):
                await scenario(batcher, scorer)
        finally:
            scorer.gate.set()
            feeding.cancel()
            device.close()

    asyncio.run(run())
    return scorer


async def hold_the_model(batcher: Batcher, scorer: RecordingScorer) -> asyncio.Future[Response]:
    """Keep the model busy with one request, so that what comes next waits together."""
    scorer.gate.clear()
    answer = batcher.submit(request(0))
    await asyncio.to_thread(scorer.entered.wait, TIMEOUT)
    return answer


def test_requests_that_wait_together_share_a_call_and_get_their_own_slices() -> None:
    async def scenario(batcher: Batcher, scorer: RecordingScorer) -> None:
        await_first = await hold_the_model(batcher, scorer)
        answers = [batcher.submit(request(value, count)) for value, count in ((1, 1), (2, 2), (3, 1), (4, 1))]
        scorer.gate.set()
        await await_first
        scores = [(await answer).scores_B.tolist() for answer in answers]
        assert scores == [[1.0], [2.0, 2.0], [3.0], [4.0]]

    assert drive(scenario).calls == [["0"], ["1", "2", "2", "3"], ["4"]]


@pytest.mark.parametrize(("count", "calls"), [(3, [4, 4, 4]), (6, [4, 4, 4, 4, 4, 4]), (9, [4] * 9)])
def test_calls_are_full_across_the_borders_of_requests(count: int, calls: list[int]) -> None:
    async def scenario(batcher: Batcher, scorer: RecordingScorer) -> None:
        await hold_the_model(batcher, scorer)
        answers = [batcher.submit(request(value, count)) for value in (1, 2, 3, 4)]
        scorer.gate.set()
        for value, answer in enumerate(answers, start=1):
            assert (await answer).scores_B.tolist() == [value] * count

    assert [len(call) for call in drive(scenario).calls[1:]] == calls


def test_a_request_is_answered_when_its_last_image_is_done_and_gradients_are_put_together() -> None:
    async def scenario(batcher: Batcher, scorer: RecordingScorer) -> None:
        pixels = np.random.default_rng(0).random((6, 3, 4, 4), dtype=np.float32)
        answers = [
            batcher.submit(GradientRequest(part, [name] * 3)) for part, name in ((pixels[:3], "a"), (pixels[3:], "b"))
        ]
        together = await asyncio.gather(*answers)
        np.testing.assert_array_equal(np.concatenate([one.gradients_BCHW for one in together]), pixels * 2)
        np.testing.assert_array_equal(np.concatenate([one.scores_B for one in together]), pixels[:, 0, 0, 0])

    assert drive(scenario).calls == [["a", "a", "a", "b"], ["b", "b"]]


def test_where_no_calls_are_shared_each_request_is_cut_on_its_own() -> None:
    async def scenario(batcher: Batcher, scorer: RecordingScorer) -> None:
        await asyncio.gather(*(batcher.submit(request(value, 6)) for value in (1, 2)))

    assert drive(scenario, share_calls=False).calls == [["1"] * 4, ["1"] * 2, ["2"] * 4, ["2"] * 2]


def test_a_piece_that_fails_fails_its_request_and_the_rest_of_it_never_runs() -> None:
    async def scenario(batcher: Batcher, scorer: RecordingScorer) -> None:
        await hold_the_model(batcher, scorer)
        good, bad, last = (
            batcher.submit(request(1, 3)),
            batcher.submit(request(2, 5, prompt="raise")),
            batcher.submit(request(3)),
        )
        scorer.gate.set()
        with pytest.raises(RewardInvalid):
            await bad
        assert [(await answer).scores_B[0] for answer in (good, last)] == [1.0, 3.0]

    assert drive(scenario).calls == [["0"], ["1", "1", "1", "raise"], ["1"] * 3, ["raise"], ["3"]]


def test_a_request_larger_than_a_batch_runs_in_chunks_and_is_answered_at_once() -> None:
    async def scenario(batcher: Batcher, scorer: RecordingScorer) -> None:
        assert (await batcher.submit(request(7, 10))).scores_B.tolist() == [7.0] * 10

    assert [len(call) for call in drive(scenario).calls] == [4, 4, 2]


def test_with_batches_of_the_group_size_every_group_is_alone() -> None:
    async def scenario(batcher: Batcher, scorer: RecordingScorer) -> None:
        await asyncio.gather(*(batcher.submit(request(value, 4)) for value in range(5)))

    assert drive(scenario, max_wait_s=5.0).calls == [[str(value)] * 4 for value in range(5)]


def test_a_lone_request_waits_for_company() -> None:
    async def scenario(batcher: Batcher, scorer: RecordingScorer) -> None:
        first = batcher.submit(request(1, 2))
        await asyncio.sleep(0)  # the batcher takes the first request and waits
        second = batcher.submit(request(2, 2))
        await asyncio.gather(first, second)

    assert drive(scenario, max_wait_s=TIMEOUT).calls == [["1", "1", "2", "2"]]


def test_sizes_and_kinds_are_not_mixed_and_the_head_goes_first() -> None:
    async def scenario(batcher: Batcher, scorer: RecordingScorer) -> None:
        await hold_the_model(batcher, scorer)
        pixels = np.full((1, 3, 4, 4), 0.25, np.float32)
        answers = [
            batcher.submit(request(1)),
            batcher.submit(request(2, side=8)),
            batcher.submit(GradientRequest(pixels, ["gradient"])),
            batcher.submit(request(3)),
        ]
        scorer.gate.set()
        gradient = (await asyncio.gather(*answers))[2]
        np.testing.assert_array_equal(gradient.gradients_BCHW, pixels * 2)
        assert gradient.scores_B.tolist() == [0.25]

    # "3" joins the head, which it fits, over those that it does not.
    assert drive(scenario).calls == [["0"], ["1", "3"], ["2"], ["gradient"]]


def test_a_full_queue_refuses_for_now_and_what_never_fits_for_ever() -> None:
    async def scenario(batcher: Batcher, scorer: RecordingScorer) -> None:
        await hold_the_model(batcher, scorer)
        large = batcher.submit(request(1, 8))
        with pytest.raises(RewardOverloaded, match="8 images wait, 1 more exceed 8"):
            batcher.submit(request(2))
        large.cancel()
        await asyncio.sleep(0)
        batcher.submit(request(3))
        with pytest.raises(
            RewardRejected, match=r"9 images in one request, at most 8 may wait: .* raise --queue-items"
        ) as caught:
            batcher.submit(request(4, 9))
        assert caught.value.cause == "too_large"

    drive(scenario, queue_images=8)


def test_a_request_whose_client_is_gone_is_not_executed() -> None:
    async def scenario(batcher: Batcher, scorer: RecordingScorer) -> None:
        await hold_the_model(batcher, scorer)
        gone, stays, gone_too, last = (batcher.submit(request(value)) for value in (1, 2, 3, 4))
        gone.cancel()
        gone_too.cancel()
        scorer.gate.set()
        await asyncio.gather(stays, last)

    assert drive(scenario).calls == [["0"], ["2", "4"]]


def test_a_nan_fails_its_own_request_and_no_other() -> None:
    async def scenario(batcher: Batcher, scorer: RecordingScorer) -> None:
        await hold_the_model(batcher, scorer)
        bad, good = batcher.submit(request(1, prompt="nan")), batcher.submit(request(2))
        scorer.gate.set()
        with pytest.raises(RewardInvalid) as caught:
            await bad
        assert caught.value.cause == "nan"
        assert (await good).scores_B.tolist() == [2.0]

    assert drive(scenario).calls == [["0"], ["nan", "2"]]


@pytest.mark.parametrize(("prompt", "cause"), [("raise", "scorer"), ("short", "count")])
def test_a_failed_call_fails_its_requests_and_the_next_one_works(prompt: str, cause: str) -> None:
    async def scenario(batcher: Batcher, scorer: RecordingScorer) -> None:
        with pytest.raises(RewardInvalid) as caught:
            await batcher.submit(request(1, prompt=prompt))
        assert caught.value.cause == cause
        assert (await batcher.submit(request(2))).scores_B.tolist() == [2.0]

    drive(scenario)


def test_a_call_whose_model_is_lost_fails_as_a_whole_and_says_nothing_of_the_speed() -> None:
    async def scenario(batcher: Batcher, scorer: RecordingScorer) -> None:
        held = await hold_the_model(batcher, scorer)
        lost = [batcher.submit(request(value, 2, prompt=prompt)) for value, prompt in ((1, "lost"), (2, ""))]
        waits = batcher.submit(request(3))
        scorer.gate.set()
        await held
        for answer in lost:
            with pytest.raises(ModelUnavailable, match="its process has ended"):
                await answer
        assert (await waits).scores_B.tolist() == [3.0]
        # Others waited during two calls, but only the first of them measured anything: one image.
        assert batcher._speed._images == 1

    assert drive(scenario).calls == [["0"], ["lost", "lost", "2", "2"], ["3"]]


def test_metadata_reaches_the_scorer_as_one_dict_per_image() -> None:
    seen: list[Sequence[Metadata]] = []

    class MetadataScorer(RecordingScorer):
        def score(self, images_BHWC: ByteArray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> FloatArray:
            seen.append(metadata)
            return np.zeros(len(prompts), np.float32)

    async def run() -> None:
        scorer = MetadataScorer()
        device = Device()
        metrics = ServerMetrics().of_scorer("m", 0.0, 1.0)
        batcher = Batcher(scorer, "m", BatchLimits(4, 0.0, 8), device, metrics)
        feeding = asyncio.create_task(batcher.run())
        await batcher.submit(ScoreRequest(np.zeros((2, 4, 4, 3), np.uint8), ["a", "b"], [{"n": 1}, {"n": 2}]))
        await batcher.submit(request(1, 2))
        feeding.cancel()
        device.close()

    asyncio.run(run())
    assert [list(metadata) for metadata in seen] == [[{"n": 1}, {"n": 2}], [{}, {}]]


def test_a_bad_request_does_not_fail_those_it_shares_a_call_with() -> None:
    async def scenario(batcher: Batcher, scorer: RecordingScorer) -> None:
        await hold_the_model(batcher, scorer)
        good, bad, fine = (
            batcher.submit(request(1)),
            batcher.submit(request(2, prompt="raise")),
            batcher.submit(request(3)),
        )
        scorer.gate.set()
        with pytest.raises(RewardInvalid) as caught:
            await bad
        assert caught.value.cause == "scorer"
        assert [(await answer).scores_B.tolist() for answer in (good, fine)] == [[1.0], [3.0]]

    assert drive(scenario).calls == [["0"], ["1", "raise", "3"], ["1"], ["raise", "3"], ["raise"], ["3"]]


def test_a_bad_request_is_found_by_halves() -> None:
    async def scenario(batcher: Batcher, scorer: RecordingScorer) -> None:
        await hold_the_model(batcher, scorer)
        answers = [batcher.submit(request(value, prompt="raise" if value == 3 else "")) for value in range(16)]
        scorer.gate.set()
        results = await asyncio.gather(*answers, return_exceptions=True)
        assert [isinstance(result, RewardInvalid) for result in results] == [value == 3 for value in range(16)]

    # The full call, then two halves of 8, 4, 2 and 1.
    assert sorted(len(call) for call in drive(scenario, max_batch=16).calls[1:]) == [1, 1, 2, 2, 4, 4, 8, 8, 16]


def test_what_waited_for_the_model_starts_without_waiting_for_company() -> None:
    async def scenario(batcher: Batcher, scorer: RecordingScorer) -> None:
        first = [batcher.submit(request(0, 4))]
        await asyncio.to_thread(scorer.entered.wait, TIMEOUT)
        second = batcher.submit(request(1))
        await asyncio.sleep(0)
        scorer.gate.set()
        await asyncio.gather(*first, second)

    # A wait for company would outlast the scenario's own limit.
    assert drive_gated(scenario, max_wait_s=10 * TIMEOUT).calls == [["0"] * 4, ["1"]]


def drive_gated(scenario: Callable[[Batcher, RecordingScorer], Awaitable[None]], max_wait_s: float) -> RecordingScorer:
    async def closed_first(batcher: Batcher, scorer: RecordingScorer) -> None:
        scorer.gate.clear()
        await scenario(batcher, scorer)

    return drive(closed_first, max_wait_s=max_wait_s)


def test_nobody_computes_the_rest_of_a_long_request_whose_client_is_gone() -> None:
    async def scenario(batcher: Batcher, scorer: RecordingScorer) -> None:
        scorer.gate.clear()
        long = batcher.submit(request(7, 12))
        await asyncio.to_thread(scorer.entered.wait, TIMEOUT)
        long.cancel()
        scorer.gate.set()
        await batcher.submit(request(1))

    assert [len(call) for call in drive(scenario).calls] == [4, 1]


def test_two_scorers_take_turns_on_one_device() -> None:
    running = 0
    most = 0
    order: list[str] = []

    class Exclusive(RecordingScorer):
        def score(self, images_BHWC: ByteArray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> FloatArray:
            nonlocal running, most
            running += 1
            most = max(most, running)
            order.append(prompts[0])
            try:
                return super().score(images_BHWC, prompts, metadata)
            finally:
                running -= 1

    async def run() -> None:
        device, metrics = Device(), ServerMetrics()
        batchers = [
            Batcher(Exclusive(), name, BatchLimits(2, 0.0, 100), device, metrics.of_scorer(name, 0.0, 255.0))
            for name in ("one", "two")
        ]
        feeding = [asyncio.create_task(batcher.run()) for batcher in batchers]
        async with asyncio.timeout(TIMEOUT):
            await asyncio.gather(
                *(
                    batcher.submit(request(1, prompt=name))
                    for batcher, name in zip(batchers, "ab", strict=True)
                    for _ in range(6)
                )
            )
        for task in feeding:
            task.cancel()
        device.close()

    asyncio.run(run())
    assert most == 1
    assert order == ["a", "b"] * 3


def test_nothing_is_queued_that_cannot_be_answered_in_time_at_the_speed_under_load() -> None:
    speed = Speed()
    assert speed.seconds(1000) == 0.0
    speed.measured(16, 4.0)
    assert speed.seconds(8) == 2.0
    speed.measured(16, 2.0)  # 16 + 0.9 * 16 images in 2 + 0.9 * 4 seconds
    assert speed.seconds(304) == pytest.approx(56.0)

    async def scenario(batcher: Batcher, scorer: RecordingScorer) -> None:
        await hold_the_model(batcher, scorer)
        batcher._speed.measured(1, 1.0)
        assert batcher.has_room(50, within_s=1.0)  # an idle queue takes anything: else nothing would be measured anew
        batcher.submit(request(1, 3), within_s=1.0)
        assert (batcher.has_room(2, within_s=5.0), batcher.has_room(3, within_s=5.0)) == (True, False)
        with pytest.raises(RewardOverloaded, match=r"3 images wait, 3 more would take 6.0 s of 5 s: try later"):
            batcher.submit(request(2, 3), within_s=5.0)

    drive(scenario)


def test_the_speed_is_measured_while_others_wait() -> None:
    async def scenario(batcher: Batcher, scorer: RecordingScorer) -> None:
        await batcher.submit(request(1))
        assert batcher._speed.seconds(1) == 0.0
        scorer.entered.clear()
        held = await hold_the_model(batcher, scorer)
        waiting = batcher.submit(request(1))
        scorer.gate.set()
        await asyncio.gather(held, waiting)
        assert batcher._speed.seconds(1) > 0.0

    drive(scenario)


def test_runs_take_turns_and_each_keeps_its_own_order() -> None:
    """Without shared calls each call shows whose turn it was."""

    async def scenario(batcher: Batcher, scorer: RecordingScorer) -> None:
        await hold_the_model(batcher, scorer)
        answers = [
            batcher.submit(request(0, prompt=f"{run}{place}"), run=run.encode())
            for run, count in (("a", 4), ("b", 2), ("c", 1))
            for place in range(count)
        ]
        scorer.gate.set()
        await asyncio.gather(*answers)

    called = [prompt for (prompt,) in drive(scenario, share_calls=False).calls]
    assert called == ["0", "a0", "b0", "c0", "a1", "b1", "a2", "a3"]


def test_a_shared_call_has_images_of_every_run_that_waits() -> None:
    async def scenario(batcher: Batcher, scorer: RecordingScorer) -> None:
        await hold_the_model(batcher, scorer)
        answers = [batcher.submit(request(0, prompt=f"a{place}"), run=b"a") for place in range(5)]
        answers.append(batcher.submit(request(0, prompt="b0"), run=b"b"))
        answers.append(batcher.submit(request(0, prompt="none")))
        scorer.gate.set()
        await asyncio.gather(*answers)

    assert drive(scenario).calls == [["0"], ["a0", "b0", "none", "a1"], ["a2", "a3", "a4"]]


def test_a_large_request_does_not_keep_the_model_from_other_runs() -> None:
    async def scenario(batcher: Batcher, scorer: RecordingScorer) -> None:
        await hold_the_model(batcher, scorer)
        answers = [batcher.submit(request(0, 10, prompt="large"), run=b"a")]
        answers += [batcher.submit(request(0, 4, prompt=prompt), run=b"b") for prompt in ("b0", "b1")]
        scorer.gate.set()
        await asyncio.gather(*answers)

    large = ["large"] * 4
    called = drive(scenario).calls
    # After b0 the call of a's turn is filled with b1.
    assert called == [["0"], large, ["b0"] * 4, large, ["b1"] * 4, ["large"] * 2]


def test_a_named_run_leaves_room_in_the_queue_to_others() -> None:
    async def scenario(batcher: Batcher, scorer: RecordingScorer) -> None:
        await hold_the_model(batcher, scorer)
        batcher.submit(request(1, 6), run=b"a")
        with pytest.raises(RewardOverloaded, match="6 images wait, 1 more exceed the share that a run has of 8"):
            batcher.submit(request(2), run=b"a")
        batcher.submit(request(3), run=b"b")
        batcher.submit(request(4))
        with pytest.raises(RewardOverloaded, match="8 images wait, 1 more exceed 8"):
            batcher.submit(request(5), run=b"c")

    drive(scenario, queue_images=8)


def test_the_expected_wait_is_that_of_the_run() -> None:
    async def scenario(batcher: Batcher, scorer: RecordingScorer) -> None:
        await hold_the_model(batcher, scorer)
        batcher._speed.measured(1, 1.0)
        batcher.submit(request(1, 20), run=b"a")
        # Of the 20 images of the other run, two are taken before these two.
        assert batcher.has_room(2, 4.0, b"b")
        assert not batcher.has_room(2, 3.9, b"b")
        with pytest.raises(RewardOverloaded, match=r"20 images wait, 2 more would take 22\.0 s of 4 s"):
            batcher.require_room(2, 4.0, b"a")

    drive(scenario)

"""Jobs over servers without any server: what is handed out when, and what waits how."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import SimpleNamespace

import pytest

from gspo_lightning.errors import UserError
from gspo_lightning.rollout import server_pool
from gspo_lightning.rollout.engine import EngineUnavailableError, WeightSyncError
from gspo_lightning.rollout.http_client import Server, ServerError
from gspo_lightning.rollout.server_pool import Patience, ServerPool

PATIENCE = Patience(ready_timeout_s=5.0, give_up_after_s=0.3, pause_s=0.01, max_in_flight=3)


def servers(count):
    return [Server(f"http://127.0.0.1:{port}") for port in range(1, count + 1)]


def at_once(next_of):
    """``next_of`` of a pool whose next jobs, or None, are there at once."""

    def asked(number, result):
        future = Future()
        future.set_result(lambda: next_of(number, result))
        return future

    return asked


def echo(server, job):
    return job


@pytest.mark.parametrize("count", [1, 2])
def test_a_server_is_asked_so_many_prompts_at_a_time(count):
    lock, under_way, most, full = threading.Lock(), {}, {}, threading.Event()

    def work(server, job):
        with lock:
            under_way[server.url] = under_way.get(server.url, 0) + 1
            most[server.url] = max(most.get(server.url, 0), under_way[server.url])
            if sum(under_way.values()) == 3 * count:
                full.set()
        assert full.wait(30)  # until all places are taken
        with lock:
            under_way[server.url] -= 1
        return 2 * job

    pool = ServerPool(servers(count), lambda server: None, lambda server, value: None, PATIENCE)
    assert pool.run(range(20), work) == [2 * job for job in range(20)]
    assert sorted(most.values()) == [3] * count


def test_a_job_that_follows_another_waits_for_no_third_and_goes_to_the_same_server():
    """Job 0 ends only when the last follower of job 1 has begun, which it never would if all jobs went in rounds."""
    last, asked = threading.Event(), []

    def work(server, job):
        asked.append((server.url, job))
        if job == 0:
            assert last.wait(30)
        if job == 31:
            last.set()
        return job

    def next_of(number, result):
        return result + 10 if number in (1, 2) and result < 30 else None

    patience = Patience(ready_timeout_s=5.0, pause_s=0.01, max_in_flight=1)
    pool = ServerPool(servers(2), lambda server: None, lambda server, value: None, patience)
    assert pool.run(range(4), work, at_once(next_of)) == [0, 31, 32, 3]
    # A server has one place here: what follows comes before jobs that nobody has begun.
    (other,) = {url for url, job in asked if job == 1}
    assert [job for url, job in asked if url == other][:4] == [1, 11, 21, 31]
    (later,) = {url for url, job in asked if job == 2}
    jobs = [job for url, job in asked if url == later]
    assert jobs[jobs.index(2) :][:4] == [2, 12, 22, 32]


def test_the_time_in_which_a_next_job_is_made_is_no_wait_for_a_server(monkeypatch):
    """It is that of environments. Here the only server failed in it, and could not be tried again."""
    failed, later = [], [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + later[0], sleep=time.sleep)
    monkeypatch.setattr(server_pool, "time", clock)

    def finished(run):
        done = sorted(wait(run.futures).done, key=lambda future: run.futures[future][1] or 0) if run.futures else []
        return [*done, *run.following]

    monkeypatch.setattr(server_pool._Run, "_finished", finished)

    def work(server, job):
        if job == 1 and not failed:
            failed.append(job)
            raise ServerError("down")
        return job

    def next_of(number, result):
        later[0] += 1000.0

    pool = ServerPool(servers(1), lambda server: None, lambda server, value: None, Patience(pause_s=0.01))
    assert pool.run([0, 1], work, at_once(next_of)) == [0, 1] and failed


def test_jobs_are_done_while_what_follows_others_is_asked_for():
    """What follows job 0 is known only when all other jobs are done, and job 1 ends without a future."""
    done, answers, threads = threading.Semaphore(0), Future(), []

    def work(server, job):
        if job > 1:
            done.release()
        return job

    def next_of(number, result):
        threads.append(threading.current_thread())
        return answers if number == 0 and result == 0 else None

    def answer():
        for _ in range(3):
            assert done.acquire(timeout=30)
        answers.set_result(lambda: threads.append(threading.current_thread()) or 7)

    other = threading.Thread(target=answer)
    other.start()
    pool = ServerPool(servers(1), lambda server: None, lambda server, value: None, PATIENCE)
    assert pool.run(range(5), work, next_of) == [7, 1, 2, 3, 4]
    other.join()
    assert len(threads) == 7 and set(threads) == {threading.current_thread()}


def test_what_follows_is_not_asked_for_any_more_once_one_has_failed():
    waiting = {number: Future() for number in range(1, 4)}

    def next_of(number, result):
        if number:
            return waiting[number]
        failed = Future()
        failed.set_exception(ValueError("an environment"))
        return failed

    def work(server, job):
        if job == 0:
            assert all_asked.wait(30)
        return job

    def asked(number, result):
        left.discard(number)
        if left == {0}:
            all_asked.set()
        return next_of(number, result)

    left, all_asked = {0, 1, 2, 3}, threading.Event()
    pool = ServerPool(servers(2), lambda server: None, lambda server, value: None, PATIENCE)
    with pytest.raises(ValueError, match="an environment"):
        pool.run(range(4), work, asked)
    assert all(future.cancelled() for future in waiting.values())


def test_a_job_that_follows_another_goes_to_a_third_server_only_if_its_own_has_failed():
    asked, failed = [], []

    def work(server, job):
        asked.append((job, server.url))
        if job == 10 and not failed:
            failed.append(server.url)
            raise ServerError("down")
        return job

    pool = ServerPool(servers(3), lambda server: None, lambda server, value: None, Patience(pause_s=60.0))
    found = pool.run([0, 1, 2], work, at_once(lambda number, result: result + 10 if result < 30 else None))
    assert found == [30, 31, 32]
    for number in (1, 2):
        assert len({url for job, url in asked if job % 10 == number}) == 1
    (before, *rest) = [url for job, url in asked if job % 10 == 0]
    assert rest[0] == before == failed[0] and before not in rest[1:]


def test_a_proof_that_failed_does_not_keep_the_server_out_of_the_next_round():
    proofs = []

    def accept(server, value):
        proofs.append(value)
        if len(proofs) == 1:
            raise WeightSyncError("other weights")

    pool = ServerPool(servers(1), lambda server: None, accept, PATIENCE)
    with pytest.raises(WeightSyncError, match="other weights"):
        pool.run([1], echo)
    assert pool.run([1, 2], echo) == [1, 2]
    assert len(proofs) == 2


def test_while_all_servers_rest_nobody_spins(monkeypatch):
    def prepare(server):
        raise ServerError("down")

    pool = ServerPool(servers(2), prepare, lambda server, value: None, Patience(0.3, pause_s=10.0))
    looks, sleep = [], time.sleep
    monkeypatch.setattr("gspo_lightning.rollout.server_pool.time.sleep", lambda s: (looks.append(s), sleep(s)))
    with pytest.raises(
        EngineUnavailableError, match=r"no rollout server was usable for 0.3 s \(ready_timeout_s\): down"
    ):
        pool.run([1], echo)
    assert 1 <= len(looks) <= 20 and min(looks) >= 0.02


def test_an_exchange_that_is_still_connecting_ends_with_the_others(monkeypatch):
    server, sent = servers(1)[0], []

    def connect(connection):
        server.abort()
        connection.sock = None

    monkeypatch.setattr(http.client.HTTPConnection, "connect", connect)
    monkeypatch.setattr(http.client.HTTPConnection, "request", lambda *a, **k: sent.append(a))
    with pytest.raises(ServerError, match="not needed any more"):
        server.post("/x", {}, 30.0)
    assert not sent


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "ftp://host", "http://", "http://host:abc", "http://host:80000", "http://host:0", "http://[::1",
     "http://host?x=1", "http://me:hidden@host:abc", "http://10.0.0..1:8000", "http://host/größe", "http://the host:8000",
     "http://host/a path"],
)  # fmt: skip
def test_what_is_no_address_is_refused_at_once_and_without_a_password(url):
    with pytest.raises(UserError, match=r"urls: '.*' is not an address such as") as caught:
        Server(url)
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    ("bad", "rest"),
    [({"request_timeout_s": 0.0}, "must be above 0"), ({"request_timeout_s": float("inf")}, "and at most 1000000"),
     ({"request_timeout_s": float("nan")}, "must be above 0"), ({"max_attempts": 0}, "must be at least 1"),
     ({"pause_s": -1.0}, "must be at least 0"), ({"ready_timeout_s": float("nan")}, "must be at least 0"),
     ({"give_up_after_s": -1.0}, "must be at least 0")],
)  # fmt: skip
def test_waits_that_cannot_be_are_refused_by_name(bad, rest):
    ((name, value),) = bad.items()
    with pytest.raises(UserError, match=rf"^rollout\.engine\.{name}={value} .*{rest}"):
        Patience(**bad)
    assert Patience(ready_timeout_s=float("inf"), give_up_after_s=0.0, pause_s=0.0).max_attempts == 8


def drips(headers, after_ten=lambda: None):
    """Address of a server whose answer comes a byte at a time, for two seconds."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        with listener, listener.accept()[0] as connection, contextlib.suppress(OSError):
            while not connection.recv(1 << 16).endswith(b"{}"):
                pass
            connection.sendall(headers)
            for number in range(100):
                connection.sendall(b" ")
                time.sleep(0.02)
                if number == 10:
                    after_ten()
            connection.sendall(b"{}")

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


ANSWERS = {
    "keeps the connection": b"HTTP/1.1 200 OK\r\nContent-Length: 102\r\n\r\n",
    "ends it": b"HTTP/1.1 200 OK\r\nContent-Length: 102\r\nConnection: close\r\n\r\n",
    "ends it, and so the answer": b"HTTP/1.0 200 OK\r\n\r\n",
}


@pytest.mark.parametrize("headers", ANSWERS.values(), ids=ANSWERS)
def test_an_answer_that_comes_a_byte_at_a_time_is_bounded_and_can_be_aborted(headers):
    with pytest.raises(ServerError, match=r"/x: no answer within 0.5 s"):
        Server(drips(headers)).post("/x", {}, 0.5)
    server = Server(drips(headers, lambda: server.abort()))
    with pytest.raises(ServerError):
        server.post("/x", {}, 30.0)


def test_a_connection_that_comes_too_late_is_not_used(monkeypatch):
    """Nothing would bound the exchange any more."""
    sent, connect = [], http.client.HTTPConnection.connect

    def slowly(connection):
        connect(connection)
        time.sleep(0.2)

    monkeypatch.setattr(http.client.HTTPConnection, "connect", slowly)
    monkeypatch.setattr(http.client.HTTPConnection, "request", lambda *a, **k: sent.append(a))
    with pytest.raises(ServerError, match="/x: no answer within 0.1 s"):
        Server(drips(b"")).post("/x", {}, 0.1)
    assert not sent


def test_one_line_says_which_server_cannot_be_used_while_another_works(capsys):
    fine, bad = servers(2)
    down, bad_attempts = [True], []

    def prepare(server):
        if server is bad:
            bad_attempts.append(server)
            if down[0]:
                raise ServerError(f"{server.url} computes in float32")

    def work(server, job):
        time.sleep(0.02)
        return job

    pool = ServerPool([fine, bad], prepare, lambda server, value: None, PATIENCE)
    for _ in range(3):
        assert pool.run(range(12), work) == list(range(12))
    line = f"rollout server cannot be used, its prompts go to others: {bad.url} computes in float32\n"
    assert len(bad_attempts) >= 3 and capsys.readouterr().err == line
    down[0] = False
    while not pool.members[1].ready:
        pool.run(range(12), work)
    assert capsys.readouterr().err == ""
    down[0] = True  # another failure, another line
    while not pool.members[1].told:
        pool.run(range(12), work)
    assert capsys.readouterr().err == line


def test_servers_that_are_all_out_of_use_are_not_said_to_hand_their_prompts_on(capsys):
    def prepare(server):
        raise ServerError("down")

    with pytest.raises(EngineUnavailableError):
        ServerPool(servers(2), prepare, lambda server, value: None, Patience(0.2, pause_s=0.01)).run([1], echo)
    assert capsys.readouterr().err == ""


def test_a_server_that_rests_is_tried_again_while_another_one_is_busy():
    """Job 0 ends only when job 1, which failed once, has been done by the server that rested."""
    done, failed = threading.Event(), []

    def work(server, job):
        if job == 0:
            assert done.wait(30)
        elif not failed:
            failed.append(job)
            raise ServerError("down")
        else:
            done.set()
        return job

    patience = Patience(ready_timeout_s=5.0, pause_s=0.01, max_in_flight=1)
    pool = ServerPool(servers(2), lambda server: None, lambda server, value: None, patience)
    assert pool.run([0, 1], work) == [0, 1] and failed == [1]


def test_a_server_may_fail_as_often_as_it_likes():
    """Tried twice a minute, one that is gone has failed a thousand times after a night."""
    member = server_pool.Member(*servers(1))
    for _ in range(2000):
        member.preparing = True
        member.rest(ServerError("gone"), 0.5)
    assert member.failures == 2000 and 29.0 < member.retry_at - time.monotonic() <= 30.0


def test_a_server_that_failed_and_does_not_come_back_is_said_once(capsys):
    fine, bad = servers(2)
    failed, attempts, often = [], [], threading.Event()

    def prepare(server):
        if server is bad and failed:
            attempts.append(server)
            if len(attempts) == 3:
                often.set()
            raise ServerError("refused")

    def work(server, job):
        if server is bad:
            failed.append(job)
            raise ServerError("gone")
        assert often.wait(30)
        return job

    assert ServerPool([fine, bad], prepare, lambda server, value: None, PATIENCE).run(range(6), work) == list(range(6))
    assert capsys.readouterr().err == "rollout server failed, its prompts go to others: gone\n"


def test_a_run_that_ends_upon_an_error_leaves_no_thread_at_work():
    begun, ended = threading.Event(), []

    def work(server, job):
        if job == 0:
            assert begun.wait(30)
            raise ValueError("a mistake")
        begun.set()
        time.sleep(0.2)
        ended.append(job)

    pool = ServerPool(servers(1), lambda server: None, lambda server, value: None, PATIENCE)
    with pytest.raises(ValueError, match="a mistake"):
        pool.run([0, 1], work)
    assert ended == [1]


def test_only_the_first_attempt_of_a_server_may_take_longer_than_the_wait_for_one():
    patience = Patience(ready_timeout_s=0.02, pause_s=0.01)
    loading = ServerPool(servers(1), lambda server: time.sleep(0.3), lambda server, value: None, patience)
    assert loading.run([1], echo) == [1]
    attempts, aborted = [], threading.Event()

    def prepare(server):
        attempts.append(server)
        if len(attempts) > 1:
            assert aborted.wait(30)  # until the run has ended
        raise ServerError("down")

    (server,) = servers(1)
    server.abort = aborted.set
    again = ServerPool([server], prepare, lambda server, value: None, Patience(ready_timeout_s=0.3, pause_s=0.01))
    with pytest.raises(EngineUnavailableError, match=r"for 0.3 s \(ready_timeout_s\): down"):
        again.run([1], echo)


def test_a_run_whose_end_was_interrupted_leaves_its_servers_to_the_next_one(monkeypatch):
    """As a second Ctrl-C does in a notebook, whose next cell samples again."""

    class Interrupted(ThreadPoolExecutor):
        def shutdown(self, wait=True, *, cancel_futures=False):
            super().shutdown(wait, cancel_futures=cancel_futures)
            raise KeyboardInterrupt

    pool = ServerPool(servers(1), lambda server: None, lambda server, value: None, PATIENCE)
    with monkeypatch.context() as patch:
        patch.setattr(server_pool, "ThreadPoolExecutor", Interrupted)
        patch.setattr(server_pool._Run, "_finished", lambda self: time.sleep(0.05) or {}[0])
        with pytest.raises(KeyboardInterrupt):
            pool.run(range(4), echo)
    (member,) = pool.members
    assert member.server._aborted

    def work(server, job):
        assert not server._aborted
        return job

    assert pool.run(range(4), work) == [0, 1, 2, 3]

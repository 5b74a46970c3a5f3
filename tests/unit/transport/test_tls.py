"""TLS from a job key: who has the key gets through, nobody else does, and both sides say why."""

from __future__ import annotations

import os
import socket
import ssl
import threading
from pathlib import Path

import pytest
from cryptography import x509

from paceline.transport import tls
from paceline.transport.keys import JobKey
from paceline.transport.tls import Credentials

KEY, OTHER = JobKey(bytes(range(32))), JobKey(bytes(range(1, 33)))


def met(server: ssl.SSLContext, client: ssl.SSLContext | None, name: str = tls.NAME) -> tuple[str, str]:
    """What each side has to say: "ok", or why not. The client is through when it has read a byte."""
    left, right = socket.socketpair()
    told = ["", ""]

    def serve() -> None:
        try:
            with server.wrap_socket(left, server_side=True) as wrapped:
                wrapped.sendall(b"!")
            told[0] = "ok"
        except ssl.SSLError as error:
            told[0] = tls.in_words(error)
            left.close()
        except OSError:
            told[0] = "cut"

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        if client is None:
            right.sendall(b"GET / HTTP/1.1\r\n\r\n")
            right.recv(100)
        else:
            with client.wrap_socket(right, server_hostname=name) as wrapped:
                told[1] = "ok" if wrapped.recv(1) == b"!" else "cut"
    except ssl.SSLError as error:
        told[1] = tls.in_words(error)
        right.close()
    except OSError:
        told[1] = "cut"
    finally:
        right.close()
    thread.join(10)
    return told[0], told[1]


def test_two_processes_with_the_same_key_meet() -> None:
    one, two = Credentials.issue(KEY), Credentials.issue(KEY)
    assert met(one.server, two.client) == ("ok", "ok")
    assert met(two.server, one.client) == ("ok", "ok")


def test_another_key_is_refused_and_both_are_told() -> None:
    server, client = met(Credentials.issue(KEY).server, Credentials.issue(OTHER).client)
    assert "job key" in server
    assert "another job key" in client


def test_a_client_that_trusts_anybody_is_still_refused() -> None:
    client = Credentials.issue(OTHER).client
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    server, told = met(Credentials.issue(KEY).server, client)
    assert "not of this job's key" in server
    assert "it refused this process's certificate" in told


def test_a_client_without_a_certificate_is_refused() -> None:
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname, bare.verify_mode = False, ssl.CERT_NONE
    server, client = met(Credentials.issue(KEY).server, bare)
    assert server == "it showed no certificate: it has no job key"
    assert client == "it wants a certificate, and got none: this process has no job key"


def test_a_server_that_asks_for_no_certificate_is_refused_by_its_name() -> None:
    assert "another job key" in met(Credentials.issue(KEY).server, Credentials.issue(KEY).client, name="else")[1]


def test_older_tls_and_http_are_refused() -> None:
    client = Credentials.issue(KEY).client
    client.minimum_version = client.maximum_version = ssl.TLSVersion.TLSv1_2
    credentials = Credentials.issue(KEY)
    assert "before 1.3" in met(credentials.server, client)[0]
    assert "speaks HTTP" in met(credentials.server, None)[0]


def test_the_authority_is_the_same_in_every_process_and_the_only_one_trusted() -> None:
    one, two = Credentials.issue(KEY), Credentials.issue(KEY)
    for context in (one.server, one.client):
        (authority,) = context.get_ca_certs(binary_form=True)
        assert two.server.get_ca_certs(binary_form=True) == [authority]
        assert context.verify_flags & ssl.VERIFY_X509_STRICT
        assert context.minimum_version == context.maximum_version == ssl.TLSVersion.TLSv1_3
        assert context.verify_mode == ssl.CERT_REQUIRED
    read = x509.load_der_x509_certificate(authority)
    assert (read.not_valid_before_utc.year, read.not_valid_after_utc.year) == (2020, 2100)
    assert read.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)


def test_no_private_key_and_no_descriptor_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    Credentials.issue(KEY)
    before = len(os.listdir("/proc/self/fd"))
    Credentials.issue(KEY)
    assert len(os.listdir("/proc/self/fd")) == before
    assert list(tmp_path.iterdir()) == []

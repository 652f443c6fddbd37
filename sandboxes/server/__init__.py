"""A server that holds sandboxes for clients on other machines: any back end of this host, over HTTP.

Covers: who has not the token (it is required unless the server is bound to loopback, where a web page of the same
machine is refused too); one client's boxes from the others'; clients that die, go silent or stop waiting; bodies
larger than the protocol needs. How many boxes live and run at once is the `Admission` of the back end behind it.
Does not cover: eavesdroppers, as there is no TLS here: put it behind a TLS proxy or an ssh tunnel
(`ssh -L 8766:127.0.0.1:8766 HOST`); floods of connections by strangers; a client with the token that asks for more
memory or time than this machine has.
"""

from palaestra.sandboxes.server._serve import serve

__all__ = ["serve"]

class TcpPeers:
    def __init__(self, *, token):
        pass

    def know(self, members):
        pass

    def call(self, uuid, request, payloads, deadline):
        from planaria.errors import WireError

        raise WireError("no peers")

    def close(self):
        pass


class PeerServer:
    def __init__(self, serve, host, port, *, token):
        self.address = (host, 1)

    def close(self):
        pass

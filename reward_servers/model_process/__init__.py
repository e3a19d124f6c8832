"""The models of a server in a process of their own: they may crash or be stuck, and the server goes on.

server's process                                        model process
batcher ─► RemoteScorer ─► ModelProcess ──socketpair──► child: Scorer.score
                                └─ watches its process, starts it again
"""

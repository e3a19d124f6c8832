"""Tiny random models of every scorer, in the published formats: to start a server without a download.

    python -m reward_servers.tiny DIR                      a model directory for each scorer, DIR/NAME
    python -m reward_servers.tiny DIR --scorer hps         that of one

Their scores mean nothing. Every file, route and limit is that of the published model.
"""

"""Run the application with uvicorn until SIGTERM or ctrl-c; requests in work are finished."""

import math

import uvicorn

from mixencoder.fast import MixEncoder
from mixencoder.index import CandidateIndex
from mixencoder.serving.app import create_app
from mixencoder.serving.logs import start_logging
from mixencoder.serving.settings import ServeConfig


def serve(config: ServeConfig, engine: MixEncoder, index: CandidateIndex | None = None) -> None:
    """Serve until the process is told to stop."""
    start_logging()
    settings = uvicorn.Config(
        create_app(config, engine, index),
        host=config.host,
        port=config.port,
        # one process: the model is in memory once, and its threads have the cores for themselves
        workers=1,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(config.shutdown_seconds),
    )
    uvicorn.Server(settings).run()

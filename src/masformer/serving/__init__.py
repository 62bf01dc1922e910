"""One model with its plan, served to OpenAI clients.

`bodies` and `messages` say what a request may ask, `prompts` makes tokens of it, `worker` runs one request after the
other, `answers` gives what comes of it OpenAI's form, and `app` is the way in. To import this needs the packages of the
extra `serve`.
"""

from masformer.serving.app import build_app, listen, run

__all__ = ["build_app", "listen", "run"]

"""Times one prompt and the tokens after it in llama.cpp, as it runs by default.

python -I time_llama_cpp.py JOB.json

The job: `folder`, the file; `tokens`, the prompt; `new_tokens`; `threads`, 0 for its own choice; and `answer`, a file
for `timings`, as its server gives them. What it says of its cache goes to standard error.
"""

import json
import sys

import xllamacpp

with open(sys.argv[1], encoding="utf-8") as file:
    job = json.load(file)
parameters = xllamacpp.CommonParams()
parameters.model.path = job["folder"]
parameters.n_ctx = len(job["tokens"]) + job["new_tokens"]
parameters.n_parallel = 1
parameters.fit_params = False
parameters.verbosity = 4
if job["threads"]:
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = job["threads"]
asked = {"prompt": job["tokens"], "n_predict": job["new_tokens"], "temperature": 0.0, "ignore_eos": True}
answer = xllamacpp.Server(parameters).handle_completions(asked | {"cache_prompt": False})
answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
with open(job["answer"], "w", encoding="utf-8") as file:
    json.dump(answer["timings"], file)
assert "masformer" not in sys.modules

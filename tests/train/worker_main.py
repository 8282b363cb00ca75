"""A worker for tests of `agro_train.workers`: it echoes, prints in between, dies, or is deaf."""

import json
import os
import sys
import time

if __name__ == "__main__":
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    results.write("ready\n")
    results.flush()
    for line in sys.stdin:
        job = json.loads(line)
        if job == "dies":
            os._exit(1)
        if job == "prints":
            print("noise")
            os.system("echo more noise")
        results.write(json.dumps(job) + "\n")
        results.flush()
        if job == "deaf":
            time.sleep(1000)

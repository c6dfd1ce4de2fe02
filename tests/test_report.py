"""A host's report comes to rank 0 as it was."""

import json
from dataclasses import asdict

import torch

from apb.generate import generate
from apb.hf import share_weights
from apb.methods import APB
from apb.parallel import run_threads
from apb.prompt import Prompt
from apb.report import HostReport, gather_reports, report_host
from apb.testing.tiny import tiny_model


def test_every_hosts_report_arrives_as_it_was():
    model, ids = tiny_model(), torch.arange(40)[None]
    prompt = Prompt(document=ids, query=ids[:, :3], suffix=ids[:, :0])

    def body(host):
        mine, method = share_weights(model), APB(anchor=4, passing=3)
        found = generate(mine, method, host, prompt, max_new_tokens=2, keep_indices=True, keep_layer=1)
        return report_host(host, mine, found), gather_reports(host, [report_host(host, mine, found)])

    runs = run_threads(2, body)
    for _, gathered in runs:
        assert gathered == [[mine] for mine, _ in runs]
    for mine, _ in runs:
        assert HostReport.from_dict(json.loads(json.dumps(asdict(mine)))) == mine and mine.kept

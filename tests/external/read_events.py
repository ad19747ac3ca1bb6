"""Reads what `events` wrote with TensorBoard's own reader and from its running server, and compares every bit."""

import json
import math
import pathlib
import struct
import sys
import urllib.parse
import urllib.request

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2

root, address = pathlib.Path(sys.argv[1]), sys.argv[2]
expected = json.loads((root / "expected.json").read_text())


def bits(value):
    """A float as TensorBoard keeps it; all NaN are one."""
    return "nan" if math.isnan(value) else struct.pack(">f", value).hex()


def wanted(pairs):
    number = lambda text: struct.unpack(">f", bytes.fromhex(text))[0]
    return [(step, bits(number(text))) for step, text in pairs]


def read():
    count = 0
    for name, run in expected.items():
        events = EventAccumulator(str(root / name), size_guidance={"scalars": 0})
        events.Reload()
        for tag, pairs in run["scalars"].items():
            found = [(event.step, bits(event.value)) for event in events.Scalars(tag)]
            assert found == wanted(pairs), (name, tag)
            count += len(found)
        content = lambda tag: plugin_data_pb2.HParamsPluginData.FromString(
            events.SummaryMetadata("_hparams_/" + tag).plugin_data.content
        )
        session = content("session_start_info").session_start_info.hparams
        assert session["lr"].number_value == run["lr"]
        assert session["model/name"].string_value == "mlp"
        assert session["model/deep"].bool_value == run["failed"]
        infos = content("experiment").experiment.hparam_infos
        assert [info.name for info in infos] == ["lr", "model/deep", "model/name", "model/width"]
        end = content("session_end_info").session_end_info
        assert end.status == (api_pb2.STATUS_FAILURE if run["failed"] else api_pb2.STATUS_SUCCESS)
        assert [event.value for event in events.Scalars("hp_metric")][0] == -1
        text = events.Tensors("said/text_summary")[0].tensor_proto.string_val[0]
        assert text == b"**good** day"
    print(f"EventAccumulator: {count} scalars of {len(expected)} runs, equal in every bit; settings, ends and texts too")


def get(path, **query):
    url = f"{address}/data/plugin/{path}?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(url) as answer:
        return json.load(answer)


def post(path, body):
    request = urllib.request.Request(
        f"{address}/data/plugin/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def serve():
    tags = get("scalars/tags")
    count = 0
    for name, run in expected.items():
        assert set(run["scalars"]) | {"hp_metric"} == set(tags[name]), tags
        for tag, pairs in run["scalars"].items():
            found = get("scalars/scalars", run=name, tag=tag)
            found = [(step, bits(float(value))) for _, step, value in found]
            assert found == wanted(pairs), (name, tag, found[:3])
            count += len(found)
    print(f"server: {count} scalars of {len(expected)} runs, equal in every bit")
    experiment = post("hparams/experiment", {"experimentName": "", "includeMetrics": True})
    names = sorted(info["name"] for info in experiment["hparamInfos"])
    assert names == ["lr", "model/deep", "model/name", "model/width"], names
    groups = post(
        "hparams/session_groups",
        {
            "experimentName": "",
            "allowedStatuses": ["STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING", "STATUS_UNKNOWN"],
            "colParams": [{"metric": {"group": "", "tag": "hp_metric"}}],
            "startIndex": 0,
            "sliceSize": 10,
        },
    )["sessionGroups"]
    for group in groups:
        session = group["sessions"][0]
        run = expected[session["name"]]
        assert group["hparams"]["lr"] == run["lr"]
        assert session["status"] == ("STATUS_FAILURE" if run["failed"] else "STATUS_SUCCESS"), session
        metric = session["metricValues"][0]["value"]
        assert bits(metric) == bits(1 - run["lr"]), metric
    assert len(groups) == len(expected)
    print(f"server: the HParams page has {len(groups)} runs with their settings, ends and hp_metric")


read()
serve()

"""A visitor of the page without a browser: presses its buttons over HTTP, as the page's own script does."""

import json
import uuid

import httpx


class Visitor:
    """Knows the page's components by their elem_id, and sends their values with every event."""

    def __init__(self, url):
        self.client = httpx.Client(base_url=url, timeout=60)
        self.session = uuid.uuid4().hex
        config = self.client.get("/config").json()
        self.components = {one["id"]: one["props"] for one in config["components"]}
        self.ids = {props["elem_id"]: key for key, props in self.components.items() if props.get("elem_id")}
        self.events = config["dependencies"]
        self.values = {key: props.get("value") for key, props in self.components.items()}

    def set(self, **values):
        """Values of components, by elem_id with _ for -."""
        for name, value in values.items():
            self.values[self.ids[name if name in self.ids else name.replace("_", "-")]] = value

    def picture(self, data, kind="png"):
        """The value of an uploaded picture."""
        answer = self.client.post("/gradio_api/upload", files={"files": (f"x.{kind}", data)})
        assert answer.status_code == 200, answer.text
        return {"path": answer.json()[0], "meta": {"_type": "gradio.FileData"}}

    def press(self, name, event="click", data=None):
        """What an event yields, one after the other: values by elem_id. A value that is not changed is left out."""
        number = next(one["id"] for one in self.events if [self.ids[name], event] in [list(x) for x in one["targets"]])
        event = self.events[number]
        body = {
            "fn_index": number, "session_hash": self.session, "data": [self.values[key] for key in event["inputs"]],
            "event_data": data, "trigger_id": self.ids[name],
        }  # fmt: skip
        if not event["queue"]:
            answer = self.client.post("/gradio_api/run/predict", json=body)
            assert answer.status_code == 200, answer.text
            yield self._told(event, answer.json()["data"])
            return
        self.client.post("/gradio_api/queue/join", json=body).raise_for_status()
        last = None
        with self.client.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.session}) as answer:
            for line in answer.iter_lines():
                message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if message.get("msg") not in ("process_generating", "process_completed"):
                    continue
                assert message["success"], message["output"]
                out = message["output"]
                if message["msg"] == "process_completed":
                    return
                last = out["data"] if last is None else [patched(a, b) for a, b in zip(last, out["data"], strict=True)]
                yield self._told(event, last)

    def last(self, name, event="click", data=None):
        """The last of what it yields."""
        return list(self.press(name, event, data))[-1]

    def _told(self, event, data):
        names = {key: name for name, key in self.ids.items()}
        told = {names.get(key, key): value for key, value in zip(event["outputs"], data, strict=True)}
        return {key: x for key, x in told.items() if not (isinstance(x, dict) and x == {"__type__": "update"})}

    def file(self, value):
        """The bytes of a file that was shown."""
        answer = self.client.get(f"/gradio_api/file={value['path']}")
        assert answer.status_code == 200, answer.text
        return answer.content


def patched(value, changes):
    """gradio sends what follows the first value of a generator as edits of it."""
    for kind, path, new in changes:
        if not path:
            value = new if kind in ("replace", "add") else value + new
            continue
        *way, end = path
        inner = value
        for step in way:
            inner = inner[step]
        if kind == "delete":
            del inner[end]
        elif kind == "append":
            inner[end] += new
        elif kind == "add" and isinstance(inner, list):
            inner.insert(end, new)
        else:
            inner[end] = new
    return value

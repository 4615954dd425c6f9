"""The test double of the Hub, through the real huggingface_hub in processes of its own."""

import json

PUSH = """
import json, sys
from pathlib import Path
from huggingface_hub import HfApi
folder = Path("model"); folder.mkdir(exist_ok=True)
(folder / "config.json").write_text('{"a": 1}')
(folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)
api = HfApi()
api.create_repo("tester/tiny", exist_ok=True, private="private" in sys.argv)
commit = api.upload_folder(repo_id="tester/tiny", folder_path=folder, commit_message="first")
print(json.dumps([api.whoami()["name"], commit.oid, len(api.list_repo_commits("tester/tiny"))]))
"""

PULL = """
import sys
from pathlib import Path
from huggingface_hub import snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
try:
    folder = Path(snapshot_download(sys.argv[1], revision=sys.argv[2] if len(sys.argv) > 2 else None))
except (RepositoryNotFoundError, RevisionNotFoundError) as error:
    print(type(error).__name__)
else:
    print(sorted(file.name for file in folder.iterdir()), (folder / "model.safetensors").read_bytes()[-1])
"""


def out(process) -> str:
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def test_what_is_pushed_is_pulled(client, hub):
    user, oid, commits = json.loads(out(client(PUSH)))
    assert (user, commits) == ("tester", 2)
    repository = hub.repositories["models", "tester/tiny"]
    assert repository.branches["main"].oid == oid
    assert repository.branches["main"].files["model.safetensors"].lfs
    assert not repository.branches["main"].files["config.json"].lfs
    assert out(client(PULL, "tester/tiny")) == "['.gitattributes', 'config.json', 'model.safetensors'] 255"


def test_pushing_the_same_again_makes_no_commit(client, hub):
    first = json.loads(out(client(PUSH)))
    uploads = [request for request in hub.requests if request.startswith("PUT")]
    assert json.loads(out(client(PUSH))) == first
    assert [request for request in hub.requests if request.startswith("PUT")] == uploads
    assert len(uploads) == 1


def test_a_private_repository_is_seen_by_its_owner_only(client):
    out(client(PUSH, "private"))
    assert out(client(PULL, "tester/tiny")).endswith("255")
    assert out(client(PULL, "tester/tiny", token=None)) == "RepositoryNotFoundError"
    assert out(client(PULL, "tester/tiny", token="hf_other")) == "RepositoryNotFoundError"
    refused = client(PULL, "tester/tiny", token="hf_wrong")
    assert refused.returncode != 0
    assert "401" in refused.stderr
    assert "Invalid credentials" in refused.stderr


def test_what_does_not_exist_has_its_own_errors(client):
    out(client(PUSH))
    assert out(client(PULL, "tester/missing")) == "RepositoryNotFoundError"
    assert out(client(PULL, "tester/tiny", "no-such-branch")) == "RevisionNotFoundError"
    missing_file = """
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
try:
    hf_hub_download("tester/tiny", "absent.json")
except RemoteEntryNotFoundError:
    print("no such file")
"""
    assert out(client(missing_file)) == "no such file"


def test_nobody_writes_without_the_right(client, hub):
    out(client(PUSH))
    upload = """
from huggingface_hub import upload_file
from huggingface_hub.errors import HfHubHTTPError
try:
    upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="tester/tiny")
except HfHubHTTPError as error:
    print(error.response.status_code)
"""
    assert out(client(upload, token="hf_other")) == "403"
    assert out(client(upload, token=None)) == "401"
    assert "x.txt" not in hub.repositories["models", "tester/tiny"].branches["main"].files


def test_branches_tags_and_deletions(client):
    history = """
from huggingface_hub import HfApi
api = HfApi()
api.create_branch("tester/tiny", branch="next")
api.create_tag("tester/tiny", tag="v1")
api.delete_file("config.json", "tester/tiny")
refs = api.list_repo_refs("tester/tiny")
print(sorted(b.name for b in refs.branches), [t.name for t in refs.tags])
for revision in ("main", "next", "v1"):
    print("config.json" in api.list_repo_files("tester/tiny", revision=revision))
info = api.model_info("tester/tiny", files_metadata=True)
print([(s.rfilename, s.size, s.lfs is not None) for s in info.siblings if s.rfilename.endswith("safetensors")])
api.delete_repo("tester/tiny")
print(api.repo_exists("tester/tiny"))
"""
    out(client(PUSH))
    assert out(client(history)).splitlines() == [
        "['main', 'next'] ['v1']",
        "False",
        "True",
        "True",
        "[('model.safetensors', 10240, True)]",
        "False",
    ]


def test_a_download_can_go_on_where_it_stopped(client):
    part = """
from huggingface_hub import hf_hub_url, get_session, get_token
url = hf_hub_url("tester/tiny", "model.safetensors")
reply = get_session().get(url, headers={"Range": "bytes=10238-", "Authorization": f"Bearer {get_token()}"})
print(reply.status_code, list(reply.content), reply.headers["Content-Range"])
"""
    out(client(PUSH))
    assert out(client(part)) == "206 [254, 255] bytes 10238-10239/10240"


def test_a_commit_needs_the_large_files_it_names(client, hub):
    forged = """
import json
from huggingface_hub import get_session
from huggingface_hub.constants import ENDPOINT
lines = [{"key": "header", "value": {"summary": "forged"}},
         {"key": "lfsFile", "value": {"path": "model.safetensors", "algo": "sha256", "oid": "0" * 64, "size": 1}}]
reply = get_session().post(f"{ENDPOINT}/api/models/tester/tiny/commit/main",
    content="\\n".join(map(json.dumps, lines)), headers={"Authorization": "Bearer hf_test"})
print(reply.status_code)
"""
    out(client(PUSH))
    assert out(client(forged)) == "400"
    assert len(hub.repositories["models", "tester/tiny"].commits) == 2

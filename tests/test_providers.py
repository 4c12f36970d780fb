import anyio

LISTING = {"category": "filesystem", "name": "files", "schema": {}}
FULL_NAME = "lab:filesystem:files"


async def test_a_read_reaches_the_provider_and_comes_back(ada, bob, events):
    provider = (await ada.put("/rooms/lab/providers", json=LISTING)).json()
    answers = []

    async def read() -> None:
        answers.append(
            await bob.get(f"/rooms/lab/providers/{FULL_NAME}", params={"path": "/"})
        )

    async with anyio.create_task_group() as readers:
        readers.start_soon(read)
        readers.start_soon(read)
        with anyio.fail_after(10):
            while not any(sent.event == "provider_request" for sent in events):
                await anyio.sleep(0.01)
        (request,) = [sent for sent in events if sent.event == "provider_request"]
        uploaded = await ada.post(
            f"/providers/{provider['id']}/results",
            content=b"[1, 2]",
            headers={"X-Request-Hash": request.data["request_id"]},
        )
        assert uploaded.status_code == 204, uploaded.text
    assert [answer.status_code for answer in answers] == [200, 200]
    assert [answer.content for answer in answers] == [b"[1, 2]", b"[1, 2]"]
    assert request.room == f"providers:{FULL_NAME}"

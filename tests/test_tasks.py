async def test_a_task_goes_its_way(admin, ada, events):
    registered = await admin.put(
        "/rooms/@global/jobs",
        json={"category": "modifiers", "name": "Rotate", "schema": {}},
    )
    assert registered.status_code == 201, registered.text
    worker = registered.json()["worker_id"]
    submitted = await ada.post(
        "/rooms/lab/tasks/@global:modifiers:Rotate", json={"payload": {"angle": 3}}
    )
    assert submitted.status_code == 202, submitted.text
    task = submitted.json()
    assert submitted.headers["Location"] == f"/v1/joblib/tasks/{task['id']}"
    claimed = await admin.post("/tasks/claim", json={"worker_id": worker})
    assert claimed.status_code == 200, claimed.text
    assert claimed.json()["task"]["id"] == task["id"]
    for status in ("running", "completed"):
        reported = await admin.patch(f"/tasks/{task['id']}", json={"status": status})
        assert reported.status_code == 200, reported.text
        assert reported.json()["status"] == status
    assert [e.event for e in events] == [
        "jobs_invalidate",
        "task_status_event",
        "task_available",
        "task_status_event",
        "task_status_event",
        "task_status_event",
    ]

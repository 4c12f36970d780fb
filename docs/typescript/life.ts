// One life of a task: what a page does, what a worker does, and what the room hears.
import createClient from "openapi-fetch";
import { io, type Socket } from "socket.io-client";
import type { paths, TaskStatusEvent, webhooks } from "./schema.js";

type Events = {
  [Name in keyof webhooks]: (
    data: webhooks[Name]["post"]["requestBody"]["content"]["application/json"],
  ) => void;
};

// what the example host takes beside them
type Requests = { join_room: (data: { room_id: string }, done: () => void) => void };

const url = process.env["URL"] ?? "http://127.0.0.1:8000";
const token = process.env["TOKEN"] ?? "";
const api = createClient<paths>({
  baseUrl: url,
  headers: { Authorization: `Bearer ${token}` },
});

/** Return what was answered; a refusal is a problem, and its detail says what is wrong. */
function answered<T>(answer: { data?: T; error?: { detail?: unknown } }): T {
  if (answer.data === undefined) throw new Error(JSON.stringify(answer.error));
  return answer.data;
}

// the room: every event has its type
const socket: Socket<Events, Requests> = io(url, { auth: { token }, transports: ["websocket"] });
const ended = new Promise<TaskStatusEvent>((resolve) => {
  socket.on("task_status_event", (event) => {
    console.log("heard", event.status);
    if (event.status === "completed") resolve(event);
  });
});
await new Promise<void>((resolve) => socket.on("connect", resolve));
await socket.emitWithAck("join_room", { room_id: "lab" });

// a worker offers a job
const job = answered(
  await api.PUT("/v1/joblib/rooms/{room_id}/jobs", {
    params: { path: { room_id: "lab" } },
    body: { category: "analysis", name: "Double", schema: { type: "object" } },
  }),
);

// a person submits a task
const submitted = answered(
  await api.POST("/v1/joblib/rooms/{room_id}/tasks/{job_name}", {
    params: { path: { room_id: "lab", job_name: job.full_name } },
    body: { payload: { number: 21 } },
  }),
);

// the worker claims, starts and completes it
const { task } = answered(
  await api.POST("/v1/joblib/tasks/claim", { body: { worker_id: job.worker_id! } }),
);
if (!task) throw new Error("nothing was claimed");
const { id, attempt = 1, payload = {} } = task;
const params = { path: { task_id: id } };
const body = { status: "running", attempt } as const;
answered(await api.PATCH("/v1/joblib/tasks/{task_id}", { params, body }));
const result = 2 * Number(payload["number"]);
answered(
  await api.PATCH("/v1/joblib/tasks/{task_id}", {
    params,
    body: { status: "completed", attempt, result },
  }),
);

// the person hears of it, and reads the result
const event = await ended;
const read = answered(
  await api.GET("/v1/joblib/tasks/{task_id}", {
    params: { path: { task_id: submitted.id }, header: { prefer: "wait=10" } },
  }),
);
if (read.revision !== event.revision) throw new Error("the event tells of another state");
console.log("read", read.status, read.result);
socket.close();

"use strict";
// The page of `rlhf chat`. Every text of a model is set as text content, never as HTML.

const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_new_tokens"];
let state = null;
let busy = false;

function byId(id) {
  return document.getElementById(id);
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) { made.className = className; }
  if (text !== undefined) { made.textContent = text; }
  return made;
}

function setStatus(text, isError) {
  byId("status").textContent = text;
  byId("status").classList.toggle("error", Boolean(isError));
}

async function post(path, body) {
  return fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body || {}),
  });
}

// Send a request if no other one is running, and use the response if it is not an error.
async function request(path, body, use) {
  if (busy) { return false; }
  setBusy(true);
  try {
    const response = await post(path, body);
    if (!response.ok) {
      setStatus((await response.json()).error || "the request failed", true);
      return false;
    }
    await use(response);
    return true;
  } catch (error) {
    setStatus("the server does not answer", true);
    return false;
  } finally {
    setBusy(false);
  }
}

// Send a request that changes the conversation, and show the new state.
function change(path, body, done) {
  return request(path, body, async function (response) {
    show(await response.json());
    setStatus(done || "");
  });
}

// Send a request to which the models reply, and show the replies while they are sampled.
function generate(path, body) {
  return request(path, body, async function (response) {
    setStatus("The models are replying…");
    const last = await readEvents(response.body.getReader(), startLiveTurn(path, body));
    show(last.state);
    setStatus(last.error || "", Boolean(last.error));
  });
}

async function readEvents(reader, showText) {
  const decoder = new TextDecoder();
  let rest = "";
  let last = null;
  for (;;) {
    const { done, value } = await reader.read();
    rest += decoder.decode(value || new Uint8Array(), { stream: !done });
    const lines = rest.split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const event = JSON.parse(line);
      if (event.state) { last = event; } else { showText(event.letter, event.text); }
    }
    if (done) { break; }
  }
  if (!last) { throw new Error("the response ended early"); }
  return last;
}

// Add a turn whose replies grow; return the function that shows the text of a reply.
function startLiveTurn(path, body) {
  const message = path === "/api/send" ? body.text : state.waiting.message;
  if (path === "/api/retry") {
    const turns = byId("turns").querySelectorAll(".turn");
    if (turns.length && state.turns.length) { turns[turns.length - 1].remove(); }
  }
  const waiting = byId("turns").querySelector(".waiting");
  if (waiting) { waiting.remove(); }
  const retried = path === "/api/retry" && state.turns.length;
  const shown = retried ? state.turns[state.turns.length - 1].message : message;
  const turn = element("article", "turn");
  if (shown) { turn.append(messageElement(shown)); }
  const grid = element("div", "replies");
  turn.append(grid);
  byId("turns").append(turn);
  const texts = new Map();
  const letters = state.models.map((_, index) => String.fromCharCode(65 + index));
  for (const letter of letters) {
    const box = element("section", "reply");
    if (letters.length > 1) { box.append(element("h2", "", letter)); }
    const text = element("p", "text");
    box.append(text);
    grid.append(box);
    texts.set(letter, text);
  }
  turn.scrollIntoView({ block: "end" });
  return (letter, text) => { texts.get(letter).textContent = text; };
}

function messageElement(text, role) {
  const made = element("div", "message");
  made.append(element("span", "role", role || (state.environment ? "environment" : "you")));
  made.append(element("span", "", text));
  return made;
}

function replyElement(turn, reply, isLast) {
  const box = element("section", reply.preferred ? "reply preferred" : "reply");
  if (state.models.length > 1) {
    const preferred = reply.preferred ? " · preferred" : "";
    box.append(element("h2", "", (reply.name ? `${reply.letter} · ${reply.name}` : reply.letter) + preferred));
  }
  if (turn.messages[reply.letter]) { box.append(element("p", "prompt", turn.messages[reply.letter])); }
  box.append(element("p", "text", reply.text));
  if (reply.notes.length) { box.append(element("p", "notes", reply.notes.join(" · "))); }
  if (reply.end) { box.append(element("p", "prompt", reply.end)); }
  if (isLast) { box.append(viewElement(reply.letter)); }
  if (isLast && !state.no_vote_because) {
    const button = element("button", "", `Prefer ${reply.letter}`);
    button.type = "button";
    button.dataset.vote = reply.letter;
    button.addEventListener("click", () => vote(turn, reply.letter));
    box.append(button);
  }
  return box;
}

// A closed part of the page. When it is opened, the text that the model sees is loaded.
function viewElement(letter) {
  const details = element("details", "view");
  const text = element("pre", "");
  details.append(element("summary", "", "What the model sees"), text);
  details.addEventListener("toggle", async () => {
    if (!details.open) { return; }
    try {
      const response = await fetch(`/api/view/${letter}`);
      const data = await response.json();
      text.textContent = response.ok ? data.text : data.error;
    } catch (error) {
      text.textContent = "the server does not answer";
    }
  });
  return details;
}

function turnElement(turn, isLast) {
  const made = element("article", "turn");
  if (turn.message) { made.append(messageElement(turn.message)); }
  if (turn.given_by_user) { made.append(element("p", "status", "Your reply in the models' place:")); }
  const grid = element("div", "replies");
  for (const reply of turn.replies) { grid.append(replyElement(turn, reply, isLast)); }
  made.append(grid);
  if (isLast && !state.no_vote_because) {
    const row = element("div", "row");
    const tie = element("button", "", "Tie");
    tie.type = "button";
    tie.id = "tie";
    tie.addEventListener("click", () => vote(turn, null));
    row.append(tie);
    made.append(row);
  }
  if (isLast && turn.is_voted) {
    const row = element("div", "row");
    const button = element("button", "", "Take back the vote");
    button.type = "button";
    button.id = "unvote";
    button.addEventListener("click", () => change("/api/unvote", { turn: turn.id }, "Vote taken back."));
    row.append(button);
    made.append(row);
  }
  if (turn.is_tie) { made.append(element("p", "status", "Tie: the conversation continues with A.")); }
  return made;
}

function waitingElement() {
  const made = element("article", "turn waiting");
  if (state.waiting.message) { made.append(messageElement(state.waiting.message)); }
  const letters = Object.keys(state.waiting.messages);
  if (letters.length) {
    const grid = element("div", "replies");
    for (const letter of letters) {
      const box = element("section", "reply");
      box.append(element("h2", "", letter), element("p", "prompt", state.waiting.messages[letter]));
      grid.append(box);
    }
    made.append(grid);
  }
  return made;
}

function show(data) {
  state = data;
  const turns = byId("turns");
  turns.replaceChildren();
  for (const message of state.opening) { turns.append(messageElement(message.content, message.role)); }
  state.turns.forEach((turn, index) => {
    turns.append(turnElement(turn, index === state.turns.length - 1));
  });
  if (state.can_generate) { turns.append(waitingElement()); }
  const models = state.models.join(", ");
  const votes = state.labels ? ` Votes are appended to ${state.labels}.` : "";
  byId("about").textContent = `${models}. Seed ${state.seed}.${votes}`;
  byId("text-label").textContent = state.environment ? "Your reply in the models' place" : "Message";
  byId("generate").hidden = !state.environment;
  byId("next").hidden = !state.environment;
  byId("system").value = state.system;
  byId("seed").value = state.seed;
  for (const name of NUMBERS) { byId(name).value = state.settings[name]; }
  turns.lastElementChild?.scrollIntoView({ block: "end" });
}

function setBusy(value) {
  busy = value;
  document.body.dataset.busy = String(value);
  for (const button of document.querySelectorAll("button")) { button.disabled = value; }
  byId("stop").disabled = false;
  byId("stop").hidden = !value;
}

function vote(turn, letter) {
  const what = letter === null ? "Tie" : `Vote for ${letter}`;
  return change("/api/vote", { turn: turn.id, letter }, state.labels ? `${what} recorded.` : `${what}.`);
}

async function submit() {
  const text = byId("text").value;
  if (!text.trim()) {
    if (state.environment) { await generate("/api/generate", {}); }
    return;
  }
  const isDone = state.environment
    ? await change("/api/act", { text })
    : await generate("/api/send", { text });
  if (isDone) { byId("text").value = ""; }
  byId("text").focus();
}

function applySettings() {
  const body = { system: byId("system").value, seed: byId("seed").value.trim() };
  for (const name of NUMBERS) {
    const number = Number(byId(name).value);
    if (byId(name).value.trim() === "" || Number.isNaN(number)) {
      setStatus(`${name} must be a number`, true);
      return;
    }
    body[name] = number;
  }
  change("/api/settings", body, "Settings applied.");
}

// Show the conversation. While the models are replying, repeat the request until they are done.
async function load() {
  try {
    const response = await fetch("/api/state");
    const data = await response.json();
    if (response.ok) {
      show(data);
      setStatus("");
    } else {
      setStatus(data.error, true);
      setTimeout(load, 500);
    }
  } catch (error) {
    setStatus("the server does not answer", true);
  }
}

function start() {
  byId("composer").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
  byId("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      submit();
    }
  });
  byId("settings-form").addEventListener("submit", (event) => { event.preventDefault(); applySettings(); });
  byId("generate").addEventListener("click", () => generate("/api/generate", {}));
  byId("stop").addEventListener("click", () => post("/api/stop"));
  byId("retry").addEventListener("click", () => generate("/api/retry", {}));
  byId("undo").addEventListener("click", () => change("/api/undo", {}, "Taken back."));
  byId("reset").addEventListener("click", () => change("/api/reset", {}, "New conversation."));
  byId("next").addEventListener("click", () => change("/api/reset", { next: true }, "Next episode."));
  load();
}

start();

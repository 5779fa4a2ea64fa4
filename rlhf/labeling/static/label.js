// Shows one item at a time, and sends each answer once with the id of its label.
"use strict";

const element = (id) => document.getElementById(id);
const settings = element("item").dataset;
const strengths = Number(settings.strengths);
const scale = Number(settings.scale);
const STRENGTH_NAMES = {
  1: ["better"],
  2: ["slightly better", "much better"],
  3: ["slightly better", "better", "much better"],
}[strengths];

let task = null;
let last = null;
let shownAt = 0;
let busy = false;
let ranks = [];

function make(tag, properties, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

// Texts become text nodes, so no text of the data is ever read as HTML.
function turns(messages, withRole) {
  return messages.map((turn) => {
    const node = make("p", { className: "turn" });
    if (withRole) { node.append(make("i", {}, turn.role)); }
    node.append(turn.text);
    return node;
  });
}

function say(text, isError) {
  element("status").textContent = text;
  element("status").classList.toggle("error", Boolean(isError));
}

async function request(path, body) {
  const options = body && {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  };
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer. Nothing that was saved is lost; answer again when it runs.");
  }
  if (response.status === 401 || response.status === 403) {
    throw new Error("The server was restarted. Open the address that it printed.");
  }
  const content = await response.json().catch(() => ({
    error: response.status === 413 ? "The text is too long." : `The server answered ${response.status}.`,
  }));
  if (!response.ok) { throw Object.assign(new Error(content.error), { status: response.status }); }
  return content;
}

async function whileBusy(action) {
  if (busy) { return; }
  busy = true;
  try {
    await action();
  } catch (error) {
    say(error.message, true);
  } finally {
    busy = false;
  }
}

async function showNext() {
  const state = await request("/api/task");
  task = state.task;
  last = state.last;
  const skipped = state.skipped ? `, ${state.skipped} skipped` : "";
  element("progress").textContent = `${state.labeled} of ${state.total} labeled${skipped}`;
  element("bar").max = Math.max(1, state.total);
  element("bar").value = state.labeled + state.skipped;
  element("undo").disabled = !last;
  element("answer-bar").hidden = false;
  element("item").hidden = !task;
  element("done").hidden = Boolean(task);
  element("choices").hidden = !task;
  element("skip").hidden = !task;
  element("note-button").hidden = !task;
  if (task) { showItem(); }
}

function showItem() {
  shownAt = performance.now();
  ranks = task.replies.map(() => 0);
  element("prompt").replaceChildren(...turns(task.prompt, true));
  element("replies-box").hidden = task.replies.length === 0;
  element("replies").replaceChildren(...task.replies.map((reply, place) => {
    const title = task.replies.length > 1 ? `Reply ${place + 1}` : "Reply";
    const head = make("h4", {}, title, make("span", { className: "rank" }));
    return make("div", { className: "reply" }, head, ...turns(reply, reply.length > 1));
  }));
  element("note").value = "";
  openNote(false);
  if (settings.mode === "demonstrations") { element("completion").value = ""; }
  showRanks();
  window.scrollTo(0, 0);
}

function openNote(open) {
  element("note-box").hidden = !open;
  element("note-button").setAttribute("aria-expanded", String(open));
  if (open) { element("note").focus(); }
}

function submit(answer) {
  return whileBusy(async () => {
    if (!task) { return; }
    try {
      await request("/api/label", {
        label_id: task.label_id,
        item_id: task.item_id,
        answer,
        note: element("note").value,
        seconds: (performance.now() - shownAt) / 1000,
        settings_id: settings.settingsId,
      });
    } catch (error) {
      if (error.status === 409) { await showNext(); }
      throw error;
    }
    await showNext();
    say(answer ? "Saved." : "Skipped.");
  });
}

function undo() {
  return whileBusy(async () => {
    if (!last) { return; }
    await request("/api/undo", { label_id: last });
    await showNext();
    say("The last label was undone.");
  });
}

function choiceButton(text, key, action) {
  const button = make("button", { type: "button" }, `${text} `, make("kbd", {}, key));
  button.dataset.key = key;
  button.addEventListener("click", action);
  return button;
}

function group(title, buttons) {
  return make("div", {}, make("span", {}, title), make("div", { className: "buttons" }, ...buttons));
}

function pairChoices() {
  let key = 0;
  const button = (text, answer) => choiceButton(text, String(++key), () => submit(answer));
  const side = (choice, order) => order.map((strength) =>
    button(STRENGTH_NAMES[strength - 1], { choice, strength }));
  const ascending = STRENGTH_NAMES.map((_, index) => index + 1);
  return [
    group("Reply 1 is", side("first", [...ascending].reverse())),
    group("Neither is better", [button("tie", { choice: "tie" })]),
    group("Reply 2 is", side("second", ascending)),
  ];
}

function ratingChoices() {
  const values = Array.from({ length: scale }, (_, index) => index + 1);
  const buttons = values.map((rating) =>
    choiceButton(String(rating), String(rating % 10), () => submit({ rating })));
  return [group(`1 is the worst, ${scale} the best`, buttons)];
}

function rankingChoices() {
  const clear = choiceButton("Clear", "c", () => { ranks = ranks.map(() => 0); showRanks(); });
  const save = choiceButton("Save", "Enter", () => {
    if (ranks.includes(0)) {
      say("Some replies have no rank: press their numbers, the best reply first.", true);
    } else {
      submit({ ranks });
    }
  });
  save.className = "primary";
  return [group("Press the numbers of the replies, the best first", [clear, save])];
}

function rankNext(place) {
  if (place >= ranks.length || ranks[place]) { return; }
  ranks[place] = Math.max(...ranks) + 1;
  showRanks();
}

function showRanks() {
  element("replies").querySelectorAll(".reply").forEach((reply, place) => {
    reply.classList.toggle("ranked", Boolean(ranks[place]));
    reply.querySelector(".rank").textContent = ranks[place] ? `rank ${ranks[place]}` : "";
  });
}

function writtenChoices() {
  const save = choiceButton("Save", "Ctrl+Enter", () =>
    submit({ completion: element("completion").value }));
  save.className = "primary";
  return [group("", [save])];
}

const CHOICES = {
  pairs: pairChoices, ratings: ratingChoices, rankings: rankingChoices, demonstrations: writtenChoices,
};

function onKey(event) {
  const isWriting = /^(TEXTAREA|INPUT)$/.test(event.target.tagName);
  if (isWriting) {
    if (event.key === "Escape") { event.target.blur(); }
    if (event.key === "Enter" && event.ctrlKey && event.target.id === "completion") {
      event.preventDefault();
      document.querySelector("[data-key='Ctrl+Enter']").click();
    }
    return;
  }
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) { return; }
  if (event.key === "Enter" && event.target.tagName === "BUTTON") { return; }
  if (settings.mode === "rankings" && /^[1-9]$/.test(event.key)) {
    event.preventDefault();
    rankNext(Number(event.key) - 1);
    return;
  }
  const button = document.querySelector(`button[data-key="${CSS.escape(event.key)}"]`);
  if (button && !button.disabled && !button.hidden) {
    event.preventDefault();
    button.click();
  }
}

element("choices").append(...CHOICES[settings.mode]());
if (settings.mode === "rankings") {
  element("replies").addEventListener("click", (event) => {
    const reply = event.target.closest(".reply");
    if (reply) { rankNext([...element("replies").children].indexOf(reply)); }
  });
}
element("skip").addEventListener("click", () => submit(null));
element("undo").addEventListener("click", undo);
element("note-button").addEventListener("click", () => openNote(element("note-box").hidden));
document.addEventListener("keydown", onKey);
whileBusy(showNext);

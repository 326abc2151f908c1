// The page of serve.py: chooses the view, and hands the server's models and settings to each.
import { ask, find, say } from "./api.js";
import * as chat from "./chat.js";
import * as look from "./look.js";
import * as settings from "./settings.js";
import { drawLegends } from "./tokens.js";
import * as watch from "./watch.js";
import * as write from "./write.js";

const views = [...document.querySelectorAll("[data-view]")];
let firstView = "#write";

function chosen() {
  const named = (hash) => views.find(({ dataset }) => `#${dataset.view}` === hash);
  return named(location.hash) ?? named(firstView);
}

function showView() {
  const view = chosen();
  const hash = `#${view.dataset.view}`;
  for (const one of views) one.hidden = one !== view;
  for (const link of document.querySelectorAll("nav a")) {
    link.ariaCurrent = link.hash === hash ? "page" : null;
  }
  // Write and Chat share the settings.
  view.querySelector("[data-settings]")?.append(find("settings-part"));
  document.title = `${view.ariaLabel} · nanohydra`;
  if (hash === "#watch") watch.refresh().catch(say);
}

find("key").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("api_key", find("key-text").value);
  location.reload();
});

try {
  const served = await ask("page/settings");
  drawLegends();
  settings.setUp(served);
  write.setUp(served, look.lookAt);
  chat.setUp(served);
  look.setUp(served);
  watch.setUp(() => chosen().dataset.view === "watch");
  if (served.models[0].is_chat) firstView = "#chat";
  addEventListener("hashchange", showView);
  showView();
} catch (error) {
  say(error);
}
